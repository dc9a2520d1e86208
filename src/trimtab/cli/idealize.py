"""``trimtab idealize``: the idealized runtime of a model, predicted and measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.options import Dtype, Gen, Json, KVDtype, Model, On, Prompt, Stack, Techniques

if TYPE_CHECKING:
    from trimtab.measure.idealized import Runtime
    from trimtab.spec.plan import Plan


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def idealize(
        model: Model,
        on: On = None,
        stack: Stack = None,
        measured: Annotated[
            bool, typer.Option("--measure/--predict", help="Also run it on this machine, or only predict.")
        ] = False,
        points: Annotated[str, typer.Option(help="full: every pair; min: nine runs, once each.")] = "full",
        prompts: Annotated[
            str, typer.Option(help="Prompt tokens that are timed.")
        ] = "1+16+32+64+128+256+384+512+768+1024",
        outputs: Annotated[str, typer.Option(help="Output tokens that are timed, three or more.")] = "1+2+4+8+16+32+64",
        trials: Annotated[int, typer.Option(help="Repetitions of every pair (full); the fastest goes.")] = 3,
        interp: Annotated[
            str | None, typer.Option(help="Between prompts: linear, helm, affine; default: linear, affine for min.")
        ] = None,
        clock: Annotated[
            str, typer.Option(help="wall, or cpu: processor time, for a machine that others use too.")
        ] = "wall",
        random_weights: Annotated[
            bool, typer.Option("--random-weights", help="Measure the architecture alone, without its weights.")
        ] = False,
        devices: Annotated[int, typer.Option(help="Devices a request occupies, for dollars and energy.")] = 1,
        price: Annotated[
            str | None,
            typer.Option(
                help="USD per device and hour, or auto: the machine's, an error if it has none; default: if it has one."
            ),
        ] = None,
        prompt: Prompt = 512,
        gen: Gen = 128,
        dtype: Dtype = "bfloat16",
        kv_dtype: KVDtype = "bfloat16",
        technique: Techniques = None,
        json: Json = False,
    ) -> None:
        """Fit T = F(p) + (o - 1) g: from the graph alone, and with --measure from runs here; price one request with it."""
        from trimtab.errors import SpecError
        from trimtab.measure.costs import usd_per_h
        from trimtab.measure.idealize import engine_endpoint, predicted_endpoint, profile, random_model
        from trimtab.measure.idealized import INTERPS, Grid, fit_runtime, parse_points
        from trimtab.spec.machine import THIS
        from trimtab.spec.workload import Workload
        from trimtab.techniques.plan import make_plan
        from trimtab.ui.progress import bars

        if points not in ("full", "min"):
            raise SpecError(f"points={points} is not known. Allowed: full, min.")
        rule = interp or ("linear" if points == "full" else "affine")
        if rule not in INTERPS:
            raise SpecError(f"interp={rule} is not known. Allowed: {', '.join(INTERPS)}.")
        asked_price = None if price in (None, "auto") else _number(price)
        if devices < 1:
            raise SpecError(f"devices={devices} is not possible. Allowed: 1 or more.")
        if measured and on not in (None, THIS):
            raise SpecError(f"--measure runs on this machine, not on {on}. Leave --on out, or use --predict.")
        if random_weights and (not measured or technique):
            raise SpecError("--random-weights measures an architecture as it is: it wants --measure and no technique.")

        def planned(machine: str | None) -> Plan:
            work, chosen = Workload(batch=1, prompt=prompt, gen=gen), technique or ()
            return make_plan(model, machine, work, chosen, dtype=dtype, kv_dtype=kv_dtype, stack=stack)

        plan = planned("a100" if measured else on)  # typos before any work
        grid = Grid(prompts=parse_points(prompts), outputs=parse_points(outputs), trials=trials)
        grid = grid.up_to(plan.base.max_position_embeddings or 1 << 30)
        grid = grid if points == "full" else grid.least()
        found: dict[str, Runtime] = {}
        with bars() as progress:
            if measured:
                from trimtab.measure.measure import ensure_calibrated

                ensure_calibrated(progress)
                plan = planned(THIS)
            hourly = usd_per_h(plan.machine, asked_price) if price or plan.machine.usd_per_h is not None else None
            once = replace(grid, trials=1)  # a prediction does not vary
            found["predicted"] = fit_runtime(profile(predicted_endpoint(plan), once))
            if measured:
                from trimtab.techniques.apply import load

                source = plan.source or plan.base.name
                chosen = technique or ()
                loaded = random_model(plan.base) if random_weights else load(source, dtype=dtype, techniques=chosen)
                samples = profile(engine_endpoint(loaded, clock), grid, progress=progress)  # type: ignore[arg-type]
                found["measured"] = fit_runtime(samples, "min")
        notes = [*(["random weights"] if random_weights else []), *(["processor time"] if clock == "cpu" else [])]
        _show(plan, found, rule, devices, hourly, json, ", ".join(notes))


def _show(
    plan: Plan, found: dict[str, Runtime], rule: str, devices: int, hourly: float | None, json: bool, note: str
) -> None:
    from trimtab.measure.costs import idealized_energy_j, idealized_usd
    from trimtab.ui.output import print_json, print_table
    from trimtab.units import format_seconds

    machine, work = plan.machine, plan.workload
    times = {name: each.time_s(work.prompt, work.gen, rule) for name, each in found.items()}  # type: ignore[arg-type]
    costs = {
        name: {
            "seconds": time_s,
            "usd": None if hourly is None else idealized_usd(time_s, hourly, devices),
            "energy_j": None if machine.tdp_w is None else idealized_energy_j(time_s, machine.tdp_w, devices),
        }
        for name, time_s in times.items()
    }
    if json:
        asked = {"prompt_tokens": work.prompt, "output_tokens": work.gen, "devices": devices, "interp": rule}
        runtimes = {name: each.to_dict() for name, each in found.items()}
        facts = {"plan": plan.to_dict(), "runtimes": runtimes, "request": asked | costs}
        return print_json({"schema": 1, **facts, "usd_per_device_h": hourly, "note": note})
    with_techniques = f" with {' '.join(plan.techniques)}" if plan.techniques else ""
    typer.echo(
        f"{plan.model.name}{with_techniques} on {machine.id} (stack {plan.stack.name}), {plan.dtype}, batch 1"
        + (f"; measured: {note}" if note else "")
    )
    names = list(found)
    rows = [
        (f"F({p})", *(format_seconds(found[name].prompt_time_s(p)) for name in names))
        for p in found[names[-1]].prompt_tokens
    ]
    rows.append(("g per further token", *(format_seconds(found[name].token_s or 0.0) for name in names)))
    rows.append(("R² of g", *(f"{found[name].r_squared:.5f}" for name in names)))
    rows.append(("largest residual", *(_residual(found[name]) for name in names)))
    rows.append((f"{work.prompt} + {work.gen} tokens ({rule})", *(format_seconds(times[name]) for name in names)))
    rows.append(("  dollars", *("-" if costs[n]["usd"] is None else f"{costs[n]['usd']:.3g}" for n in names)))
    rows.append(
        (
            "  joules at the limit",
            *("-" if costs[n]["energy_j"] is None else f"{costs[n]['energy_j']:.3g}" for n in names),
        )
    )
    print_table(("", *(f">{name}" for name in names)), rows)
    if hourly is None:
        typer.echo(f"No dollars: {machine.id} has no hourly price; give one with --price.")
    for name in names:
        for warning in found[name].warnings:
            typer.echo(f"Warning ({name}): {warning}")


def _number(text: str) -> float:
    from trimtab.errors import SpecError

    try:
        return float(text)
    except ValueError:
        raise SpecError(f"price={text} is not possible. Allowed: a number of USD per hour, or auto.") from None


def _residual(runtime: Runtime) -> str:
    from trimtab.units import format_seconds

    worst = runtime.largest_residual
    if worst is None:
        return "-"
    return f"{format_seconds(worst.seconds)} at {worst.prompt_tokens}+{worst.output_tokens}"
