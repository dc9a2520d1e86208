"""``trimtab convert``: save a model with techniques on it as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json, Techniques


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def convert(
        model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a .gguf file or a hub id.")],
        out: Annotated[Path, typer.Argument(help="A folder, or a name that ends in .gguf.")],
        technique: Techniques = None,
        to: Annotated[
            str,
            typer.Option(
                help="safetensors (transformers, vLLM), gguf (llama.cpp), own (Trimtab: holds everything); auto: GGUF by the "
                "name, else safetensors if that can hold the model, else own."
            ),
        ] = "auto",
        calibration: Annotated[
            Path | None, typer.Option(help="Text file techniques calibrate on; default: the built-in text.")
        ] = None,
        eval: Annotated[
            str | None,
            typer.Option(help="Measure quality on a text file, or topics (built-in), and write it into the manifest."),
        ] = None,
        dtype: Annotated[
            str,
            typer.Option(
                help="Of what is not in codes: float32, bfloat16, float16, or file (as stored). auto: as stored; techniques that "
                "fill weights of their own start from float32."
            ),
        ] = "auto",
        force: Annotated[
            bool, typer.Option("--force", help="Do it again, and replace what an earlier call wrote.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Save a model with techniques on it, whole or not at all, with a manifest of what was done."""
        import sys

        import trimtab
        from trimtab.techniques.materials import text_materials
        from trimtab.ui.output import print_json
        from trimtab.ui.progress import bars
        from trimtab.units import format_bytes

        with bars() as progress:
            done = trimtab.convert(
                model, out, techniques=technique or (), to=to, dtype=dtype, eval=eval, force=force, progress=progress,
                materials=text_materials(calibration) if calibration else None,
            )  # fmt: skip
        for note in done.notes:
            print(note, file=sys.stderr)
        if json:
            return print_json(
                {"schema": 1, "out": str(out), "fresh": done.fresh, "notes": list(done.notes), **done.manifest}
            )
        with_ = " + ".join(done.manifest["resolved"]) or "nothing"
        if not done.fresh:
            typer.echo(f"{out} is there already: {model} with {with_} (--force does it again)")
            return None
        size = format_bytes(done.manifest["bytes"]["tensors"])
        typer.echo(f"{out}: {model} with {with_}, {size} of tensors ({done.manifest['target']})")
        for name, found in done.manifest.get("quality", {}).items():
            typer.echo(
                f"on {name}: KL {found['kl_nats']:.4f} nats, perplexity {found['ppl']:.3f} (unmodified {found['ppl_base']:.3f}), "
                f"top-1 agreement {found['top1_agreement']:.4f}, {found['tokens']} tokens"
            )
        return None
