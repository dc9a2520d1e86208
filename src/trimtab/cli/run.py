"""``trimtab run``: generate text, with techniques on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def run(
        model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a .gguf file or a hub id.")],
        prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
        technique: Annotated[list[str], typer.Option("-t", "--technique", help="Spec string; repeatable.")] = [],  # noqa: B006
        gen: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
        top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
        top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
        min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
        repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
        seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
        stop: Annotated[list[str], typer.Option(help="Stop string; repeatable.")] = [],  # noqa: B006
        raw: Annotated[
            bool, typer.Option("--raw", help="Feed the prompt as it is, without the chat template.")
        ] = False,
        ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
        dtype: Annotated[
            str, typer.Option(help="float32, bfloat16, float16, or file to keep quantized blocks.")
        ] = "float32",
        calibration: Annotated[Path | None, typer.Option(help="Text file techniques calibrate on.")] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON when done instead of streaming.")] = False,
    ) -> None:
        """Generate text and stream it to stdout."""
        import sys

        import trimtab
        from trimtab.techniques.materials import text_materials
        from trimtab.techniques.registry import parse_all
        from trimtab.ui.output import print_json

        chosen = parse_all(technique)
        text = sys.stdin.read() if prompt == "-" else prompt
        materials = text_materials(calibration) if calibration else None
        loaded = trimtab.load(model, dtype=dtype, techniques=chosen, materials=materials)
        options: dict[str, Any] = dict(
            max_new_tokens=gen, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            repetition_penalty=repetition_penalty, stop=tuple(stop), ignore_eos=ignore_eos, chat=not raw,
        )  # fmt: skip
        if json:
            output = loaded.generate(text, **options)
            return print_json(
                {"schema": 1, "text": output.text, "ids": list(output.ids), "techniques": [str(t) for t in chosen]}
            )
        for piece in loaded.generate(text, stream=True, **options):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
