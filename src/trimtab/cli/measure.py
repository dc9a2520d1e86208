"""``trimtab measure``: predicted beside measured, quality included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Batch, Dtype, Gen, Json, KVDtype, Model, Prompt, Techniques


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def measure(
        model: Annotated[str | None, Model.__metadata__[0]] = None,  # type: ignore[attr-defined]
        batch: Batch = 1,
        prompt: Prompt = 512,
        gen: Gen = 128,
        dtype: Dtype = "bfloat16",
        kv_dtype: KVDtype = "bfloat16",
        technique: Techniques = None,
        rounds: Annotated[int, typer.Option(help="Interleaved rounds of baseline and variant.")] = 3,
        text: Annotated[Path | None, typer.Option(help="Held-out text for quality; default: built-in.")] = None,
        calibration: Annotated[
            Path | None, typer.Option(help="Text techniques calibrate on; default: built-in.")
        ] = None,
        list_runs: Annotated[bool, typer.Option("--list", help="Show the ledger instead of measuring.")] = False,
        json: Json = False,
    ) -> None:
        """Predict, then run on this machine, and show both; the run goes into the ledger."""
        import dataclasses

        from trimtab.errors import SpecError
        from trimtab.ui.output import print_json

        if list_runs:
            return _list(json)
        if model is None:
            raise SpecError("measure wants a model, for example: trimtab measure smollm2-135m -t rtn:bits=4")
        if rounds < 1:
            raise SpecError(f"rounds={rounds} is not possible. Allowed: 1 or more. Try --rounds 3.")
        from trimtab.graph.passes import prompt_held
        from trimtab.measure.measure import agreement, compare, ensure_calibrated, prepare
        from trimtab.measure.texts import read_text
        from trimtab.runtime.engine.generate import check_context
        from trimtab.spec.runnable import check_runnable
        from trimtab.spec.workload import Workload
        from trimtab.techniques.materials import text_materials
        from trimtab.techniques.plan import make_plan
        from trimtab.ui.comparison import Compared, table_cells
        from trimtab.ui.output import print_table
        from trimtab.ui.progress import bars

        workload = Workload(batch=batch, prompt=prompt, gen=gen)
        held_out = read_text(text) if text else None
        materials = text_materials(calibration) if calibration else None
        # Typos, and what cannot run, before any work.
        asked = make_plan(model, "a100", workload, technique or (), dtype=dtype, kv_dtype=kv_dtype)
        check_runnable(asked.model)
        check_context(asked.model, prompt_held(asked.model, prompt), gen)
        with bars() as progress:
            ensure_calibrated(progress)
            plan = make_plan(model, "this", workload, technique or (), dtype=dtype, kv_dtype=kv_dtype)
            base, variant = prepare(plan, materials=materials, progress=progress)
            arms = [base, variant] if plan.techniques else [base]
            found = compare(arms, rounds=rounds, text=held_out, progress=progress)
        if json:
            last = found[-1]
            pairs = [{**dataclasses.asdict(a), "equal": a.equal} for a in agreement(last.predicted, last.measured)]
            reports = {"predicted": last.predicted.to_dict(), "measured": last.measured.to_dict()}
            return print_json({"schema": 1, **reports, "agreement": pairs})
        plan = base.plan
        typer.echo(
            f"{plan.model.name} on this machine, {plan.dtype}, cache {plan.kv_dtype}: batch {batch}, prompt {prompt}, gen {gen}; "
            f"{rounds} interleaved rounds, medians"
        )
        print_table(
            *table_cells([Compared(label=m.arm.label, predicted=m.predicted, measured=m.measured) for m in found])
        )
        rows = []
        for each in found:
            for a in agreement(each.predicted, each.measured):
                verdict = "equal" if a.equal else "expectation" if a.observed else "DIFFERS"
                rows.append((each.arm.label, a.name, f"{a.predicted:,}", f"{a.measured:,}", verdict))
        print_table(("", "count", ">predicted", ">metered", ""), rows)
        for each in found:
            figure = each.measured.figures["tpot_s"]
            if figure.value:
                spread = f"{figure.p10 * 1e3:.1f}-{figure.p90 * 1e3:.1f} ms" if figure.p10 and figure.p90 else ""
                typer.echo(f"TPOT of {each.arm.label}: rounds {spread}.")
            for note in each.measured.notes:
                typer.echo(f"Note: {note}")


def _list(json: bool) -> None:
    from trimtab.measure.ledger import Ledger
    from trimtab.ui.output import print_json, print_table
    from trimtab.units import format_seconds

    runs = Ledger().runs()
    if json:
        return print_json({"schema": 1, "runs": [run.to_dict() for run in runs]})
    rows = []
    for run in runs:
        pair = []
        for report in (run.predicted, run.measured):
            value = ((report or {}).get("figures", {}).get("tpot_s") or {}).get("value")
            pair.append("-" if value is None else format_seconds(value))
        work = run.plan["workload"]
        shape = f"{work['batch']} x {work['prompt']}+{work['gen']}"
        rows.append(
            (str(run.id), run.started_utc, run.state, run.model, run.techniques or "-", shape, " | ".join(pair))
        )
    print_table((">run", "started", "state", "model", "techniques", "workload", ">TPOT predicted | measured"), rows)
