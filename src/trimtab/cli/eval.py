"""``trimtab eval``: quality alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import eval_kv, eval_text
from trimtab.cli.options import Json, Model, Techniques

_Calibration = Annotated[Path | None, typer.Option(help="Text techniques calibrate on; default: built-in.")]
_Float = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]


def register(app: typer.Typer) -> None:
    """Add the verb and its kinds."""
    group = typer.Typer(help="Quality of a model with techniques against the model without.", no_args_is_help=True)

    eval_text.register(group)

    @group.command("needle")
    def needle(
        model: Model,
        technique: Techniques = None,
        tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
        count: Annotated[int, typer.Option(help="Prompts.")] = 8,
        seed: Annotated[int, typer.Option(help="Of keys, numbers and places.")] = 0,
        text: Annotated[
            str | None, typer.Option(help="Haystack: a file or topics; default: plain noise sentences.")
        ] = None,
        dtype: _Float = "float32",
        calibration: _Calibration = None,
        json: Json = False,
    ) -> None:
        """Is a hidden number found? Exact match and negative log-likelihood of the answer."""
        import dataclasses

        from trimtab.measure.needles import grade
        from trimtab.measure.texts import read_text
        from trimtab.runtime.text.needles import needle_prompts
        from trimtab.ui.output import print_json, print_table

        haystack = read_text(text) if text else None
        with _arms(model, technique, dtype, calibration) as (base, variant, label, progress):
            prompts = needle_prompts(base.tokenizer, tokens=tokens, count=count, seed=seed, haystack=haystack)
            arms = {"unmodified": base, label: variant} if label else {"unmodified": base}
            found = {name: grade(arm, progress(name, prompts)) for name, arm in arms.items()}
        if json:
            results = {name: dataclasses.asdict(result) for name, result in found.items()}
            return print_json({"schema": 1, "model": model, "tokens": tokens, "results": results})
        rows = [
            (name, f"{r.exact:.0%} of {r.prompts}", f"{r.answer_nll_nats:.3f} nats", f"{r.answer_nll_se:.3f}")
            for name, r in found.items()
        ]
        print_table(("", ">exact", ">answer nll", ">standard error"), rows)

    eval_kv.register(group)
    app.add_typer(group, name="eval")


def _arms(model: str, techniques: list[str] | None, dtype: str, calibration: Path | None):
    """Load a model and derive its variant; yields (base, variant, label, progress)."""
    from contextlib import contextmanager

    @contextmanager
    def opened():
        from trimtab.model.variant import Model as Loaded
        from trimtab.techniques.apply import default_materials, derive, load, resolve_all
        from trimtab.techniques.materials import text_materials
        from trimtab.techniques.registry import parse_all
        from trimtab.ui.progress import bars

        chosen = parse_all(techniques or ())
        base = load(model, dtype=dtype)
        with bars() as progress:
            materials = (text_materials(calibration) if calibration else default_materials(base)).for_model(
                base, progress
            )
            chosen = resolve_all(base, chosen, materials)
            variant = Loaded(derive(base.variant, chosen, materials), lambda: base.tokenizer)
            yield base, variant, " + ".join(str(each) for each in chosen), progress

    return opened()
