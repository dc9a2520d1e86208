"""``trimtab prepare``: resolve every ``auto`` of a technique on a model and keep what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def prepare(
        model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a .gguf file or a hub id.")],
        technique: Annotated[list[str], typer.Option("-t", "--technique", help="Spec string; repeatable.")],
        calibration: Annotated[
            Path | None, typer.Option(help="Text file to calibrate on; default: the built-in text.")
        ] = None,
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        save_thresholds: Annotated[Path | None, typer.Option(help="Write the thresholds of cats to this file.")] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Calibrate techniques on a model; later runs find the result in the cache."""
        import dataclasses

        import trimtab
        from trimtab.errors import SpecError
        from trimtab.techniques.apply import default_materials, derive, resolve_all
        from trimtab.techniques.ffn._thresholds import save
        from trimtab.techniques.materials import text_materials
        from trimtab.techniques.registry import parse_all
        from trimtab.ui.output import print_json
        from trimtab.ui.progress import bars

        chosen = parse_all(technique)
        loaded = trimtab.load(model, dtype=dtype)
        materials = text_materials(calibration) if calibration else default_materials(loaded)
        with bars() as progress:
            materials = dataclasses.replace(materials.for_model(loaded, progress), use_shipped=False)
            resolved = resolve_all(loaded, chosen, materials)
            variant = derive(loaded.variant, resolved, materials)
        thresholds = {
            path.removesuffix(".threshold"): float(packed.buffers["data"][0, 0])
            for path, packed in variant.weights.items()
            if path.endswith(".threshold")
        }
        if save_thresholds:
            if not thresholds:
                raise SpecError("--save-thresholds needs cats among the techniques, for example -t cats:sparsity=0.5.")
            save(save_thresholds, variant.spec, thresholds)
        specs = [str(technique) for technique in resolved]
        if json:
            return print_json({"schema": 1, "model": model, "techniques": specs, "thresholds": thresholds})
        for spec in specs:
            typer.echo(spec)
