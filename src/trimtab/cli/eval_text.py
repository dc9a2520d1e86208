"""``trimtab eval text``: how well a changed model still predicts text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.options import Json, Model, Techniques

if TYPE_CHECKING:
    from trimtab.measure.textbench import BenchResult, RecoveredShare


def register(group: typer.Typer) -> None:
    """Add the command to the group of `eval`."""

    @group.command("text")
    def text(
        model: Model,
        technique: Techniques = None,
        text: Annotated[
            list[str] | None,
            typer.Option(help="Text file, or topics: the built-in held-out text (the default); repeatable."),
        ] = None,
        windows: Annotated[int, typer.Option(help="Most windows of a text, spread over it.")] = 8,
        tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
        naive: Annotated[
            str | None,
            typer.Option(metavar="SPEC", help="Spec to compare with: the share of its loss that -t recovers."),
        ] = None,
        engine: Annotated[
            str,
            typer.Option(
                help="torch, native, or auto: native where it can be lowered. The unmodified model runs in torch."
            ),
        ] = "torch",
        dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16 (torch).")] = "float32",
        calibration: Annotated[
            Path | None, typer.Option(help="Text techniques calibrate on; default: built-in.")
        ] = None,
        cache: Annotated[bool, typer.Option(help="Keep what the unmodified model says, for the next time.")] = True,
        json: Json = False,
    ) -> None:
        """Perplexity, KL and top-1 agreement on windows of texts, paired by token."""
        import dataclasses

        from trimtab.errors import SpecError, unknown
        from trimtab.measure.base_logits import BaseLogits
        from trimtab.measure.textbench import TextBench, paired, recovered_share
        from trimtab.techniques.apply import default_materials, load, resolve_all
        from trimtab.techniques.materials import text_materials
        from trimtab.techniques.registry import parse_all
        from trimtab.ui.output import print_json
        from trimtab.ui.progress import bars

        if engine not in ("auto", "native", "torch"):
            raise unknown("engine", engine, ("auto", "native", "torch"))
        texts = _read(text or ["topics"])
        asked = [parse_all(technique or ()), parse_all([naive]) if naive else ()]
        base = load(model, dtype=dtype)
        results: list[BenchResult] = []
        notes: list[str] = []
        with bars() as progress:
            logits = BaseLogits() if cache else BaseLogits(None)
            bench = TextBench(base, texts, window=tokens, windows=windows, logits=logits, progress=progress)
            materials = (text_materials(calibration) if calibration else default_materials(base)).for_model(
                base, progress
            )
            bench.prepare()
            for specs in asked if naive else asked[:1]:
                chosen = resolve_all(base, specs, materials)
                label = " + ".join(map(str, chosen))
                arm, note = _arm(model, base, chosen, materials, engine)
                notes += [note] if note and note not in notes else []
                results.append(bench.score(arm, label))
        method = results[0]
        share = None
        if naive:
            try:
                share = recovered_share(method, results[1])
            except SpecError as error:  # the naive spec loses nothing here: what was measured is still worth showing
                notes.append(str(error))
        against = paired(method, results[1]) if naive else None
        if json:
            report: dict[str, Any] = {"schema": 1, "model": model, "techniques": method.label, "engine": engine}
            report |= {"text": next(iter(texts))} if len(texts) == 1 else {}
            report |= method.to_dict() | {"notes": notes}
            if against:
                report |= {"naive": {"techniques": results[1].label} | results[1].to_dict()}
                report |= {"recovered_share": dataclasses.asdict(share) if share else None}
                report |= {"difference": dataclasses.asdict(against)}
            return print_json(report)
        count = sum(map(len, bench.windows.values()))
        typer.echo(
            f"{model} with {method.label or 'nothing'} on {', '.join(texts)}: {count} windows of {tokens}, "
            f"{method.tokens} tokens scored"
        )
        for note in notes:
            typer.echo(note)
        if len(texts) == 1:
            _print_one(method, share)
        else:
            _print_several(method, share)
        if against:
            typer.echo(
                f"less {results[1].label}, paired by token: KL {against.kl_nats:+.4f} nats (standard error {against.kl_se:.4f}), "
                f"nll {against.nll_nats:+.4f} nats ({against.nll_se:.4f})"
            )


def _read(sources: list[str]) -> dict[str, str]:
    """Texts by name: what was given, each once."""
    from trimtab.errors import CalibrationError
    from trimtab.measure.texts import read_text

    if len(set(sources)) < len(sources):
        raise CalibrationError(f"A text is given twice: {', '.join(sources)}. Give each once.")
    return {source: read_text(source) for source in sources}


def _arm(model: str, base: Any, chosen: Any, materials: Any, engine: str) -> tuple[Any, str]:
    """What is scored, and why it does not run natively."""
    from trimtab.errors import UnsupportedModelError
    from trimtab.techniques.apply import derive, load_native
    from trimtab.techniques.base import Technique

    why = ""
    if engine != "torch":
        # a technique that fills weights of its own starts from floats
        plain = all(type(each).convert is Technique.convert for each in chosen)
        try:
            return load_native(model, dtype="file" if plain else "float32", techniques=chosen, materials=materials), ""
        except UnsupportedModelError as error:
            if engine == "native":
                raise
            why = f"in torch: {error}"
    return (derive(base.variant, chosen, materials) if chosen else base), why


def _print_one(found: BenchResult, share: RecoveredShare | None) -> None:
    from trimtab.ui.output import print_table

    rows = [
        ("KL to the unmodified model", f"{found.kl_nats:.4f} nats", f"{found.kl_se:.4f}"),
        ("perplexity", f"{found.ppl:.3f}", f"{found.ppl * found.nll_difference_se:.3f}"),
        ("perplexity, unmodified", f"{found.ppl_base:.3f}", ""),
        ("difference of nll, paired", f"{found.nll_difference:+.4f} nats", f"{found.nll_difference_se:.4f}"),
        ("top-1 agreement", f"{found.top1_agreement:.4f}", f"{found.top1_se:.4f}"),
    ]
    if share:
        rows.append(("recovered share", f"{share.geometric_mean:.3f}", ""))
    print_table(("", ">value", ">standard error"), rows)


def _print_several(found: BenchResult, share: RecoveredShare | None) -> None:
    """A row for each text, and one for all: geometric mean perplexity, KL and agreement over all tokens."""
    from trimtab.ui.output import print_table

    columns = ["", ">tokens", ">unmodified", ">perplexity", ">KL nats", ">(se)", ">nll difference", ">(se)", ">top-1"]
    rows = []
    for name, quality in [*found.texts.items(), ("geometric mean", found.quality())]:
        row = [
            name, str(quality.tokens), f"{quality.ppl_base:.3f}", f"{quality.ppl:.3f}", f"{quality.kl_nats:.4f}",
            f"{quality.kl_se:.4f}", f"{quality.nll_difference:+.4f}", f"{quality.nll_difference_se:.4f}",
            f"{quality.top1_agreement:.4f}",
        ]  # fmt: skip
        if share:
            row.append(f"{share.texts.get(name, share.geometric_mean):.3f}")
        rows.append(row)
    print_table([*columns, *([">recovered"] if share else [])], rows)
