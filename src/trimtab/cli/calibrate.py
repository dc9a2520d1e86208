"""``trimtab calibrate``: fit a Stack to this machine."""

from __future__ import annotations

import typer

from trimtab.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def calibrate(json: Json = False) -> None:
        """Measure this machine in under a minute; afterwards it can be named `this` and is the default."""
        import dataclasses

        from trimtab.measure.calibrate import calibrate as run
        from trimtab.spec.machine import this_machine_path
        from trimtab.ui.output import print_json, print_table
        from trimtab.ui.progress import bars
        from trimtab.units import format_seconds, format_si

        with bars() as progress:
            found = run(progress=progress)
        if json:
            stack = {name: dataclasses.asdict(value) for name, value in found.stack.op_classes.items()}
            facts = {"machine": dataclasses.asdict(found.machine), "op_classes": stack, "band": found.stack.band}
            facts["threads"] = [dataclasses.asdict(rate) for rate in found.threads]
            return print_json({"schema": 1, **facts, "residuals": found.residuals, "time_s": found.time_s})
        machine = found.machine
        peaks = ", ".join(f"{dtype} {format_si(rate, 'FLOP/s')}" for dtype, rate in machine.flops_per_s.items())
        typer.echo(f"{machine.name}: {peaks}")
        sets = found.stack.bandwidth_by_working_set
        typer.echo("read bandwidth: " + ", ".join(f"{a / 2**20:g} MiB {format_si(b, 'B/s')}" for a, b in sets))
        for rate in found.threads:
            gemm, read = format_si(rate.gemm_flops_per_s, "FLOP/s"), format_si(rate.read_bytes_per_s, "B/s")
            typer.echo(
                f"{rate.threads} thread{'s' * (rate.threads > 1)}: fp32 products {gemm}, reads of 256 MiB {read}"
            )
        rows = [
            (name, f"{c.compute_efficiency:.3f}", f"{c.bandwidth_efficiency:.3f}", format_seconds(c.launch_s))
            for name, c in found.stack.op_classes.items()
            if "." in name
        ]
        print_table(("op class", ">of peak", ">of bandwidth", ">per launch"), rows)
        p10, p50, p90 = found.residuals
        typer.echo(f"Whole passes, measured over predicted: P10 {p10:.2f}, P50 {p50:.2f}, P90 {p90:.2f}.")
        typer.echo(f"Written to {this_machine_path()} in {found.time_s:.0f} s. It is `--on this` and the default now.")
