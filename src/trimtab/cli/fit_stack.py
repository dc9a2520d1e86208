"""``trimtab fit-stack``: fit the constants of kernels to recorded latencies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.options import Json

if TYPE_CHECKING:
    from trimtab.measure.recorded.fit_stack import FitReport

Data = Annotated[
    Path | None,
    typer.Argument(metavar="DATA", help="Folder with gemm.csv and the like, or one such file; default: what ships."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Fit one device only: its name in the tables, or a machine.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for one TOML file per machine; default: none is written.")
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Splits into fitted and held-out sizes to try.")]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("fit-stack")
    def fit_stack(
        data: Data = None, device: Device = None, out: Out = None, seeds: Seeds = 5, json: Json = False
    ) -> None:
        """Fit kernel constants to recorded latencies, and check them on sizes held out of the fit."""
        import dataclasses

        from trimtab.measure.recorded.fit_stack import fit_tables, read_tables, write_files
        from trimtab.ui.output import print_json, print_table
        from trimtab.ui.progress import bars

        tables = read_tables(data)
        with bars() as progress:
            reports = fit_tables(tables, device=device, seeds=seeds, progress=progress)
        written = [str(path) for path in write_files(reports, out.expanduser())] if out else []
        if json:
            return print_json({"schema": 1, "fits": [dataclasses.asdict(r) for r in reports], "written": written})
        columns = (
            *("machine", "op class", ">rows", ">datasheet", ">3 constants", ">form", ">over splits"),
            *(">median", ">bias", "P10-P90", ">covered", ">ideal too slow"),
        )
        print_table(columns, [_row(report) for report in reports])
        typer.echo(
            "Errors: mean of |predicted / measured - 1| on sizes held out of the fit. P10-P90: measured over predicted of the "
            "fitted ones. Covered: rows held out inside it, mean over splits. Ideal too slow: rows the datasheet's roofline "
            "predicts more than 2 % above the measurement, of those beyond twice the last-level cache."
        )
        for path in written:
            typer.echo(f"Written to {path}.")


def _row(report: FitReport) -> tuple[str, ...]:
    low, high = min(report.mape_by_seed), max(report.mape_by_seed)
    return (
        report.machine,
        report.op_class,
        str(report.rows_held_out),
        f"{report.datasheet.mape:.1%}",
        f"{report.roofline.mape:.1%}",
        f"{report.fitted.mape:.1%}",
        f"{low:.1%} - {high:.1%}",
        f"{report.fitted.median:.1%}",
        f"{report.fitted.bias:+.1%}",
        f"{report.band[0]:.2f} - {report.band[1]:.2f}",
        f"{report.covered:.0%}",
        f"{report.ideal_violations}/{report.ideal_rows}",
    )
