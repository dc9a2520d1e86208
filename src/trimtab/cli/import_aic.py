"""``trimtab import-aic``: recorded tables out of a copy of aiconfigurator-core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("import-aic")
    def import_aic(
        source: Annotated[
            Path, typer.Argument(metavar="WHEEL_OR_FOLDER", help="The aiconfigurator-core wheel, or it unpacked.")
        ],
        out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the CSV files go.")],
        device: Annotated[
            list[str] | None,
            typer.Option("--device", metavar="DEVICE", help="Machine id or alias; repeatable; default all."),
        ] = None,
        json: Json = False,
    ) -> None:
        """Turn a copy of the aiconfigurator-core tables into a folder for `fit-stack` and `validate --data`."""
        import time

        from trimtab.measure.recorded.import_aic import import_aic as run
        from trimtab.ui.output import print_json, print_table

        start = time.perf_counter()
        written = run(source, out, device or (), lambda name, rows: typer.echo(f"{name}: {rows} rows", err=True))
        time_s = time.perf_counter() - start
        if json:
            tables = [
                {"table": item.name, "path": str(item.path), "rows": item.rows, "devices": list(item.devices)}
                for item in written
            ]
            return print_json({"schema": 1, "tables": tables, "time_s": time_s})
        rows = [(item.name, f"{item.rows:,}", ", ".join(item.devices), str(item.path)) for item in written]
        print_table(("table", ">rows", "devices", "file"), rows)
        typer.echo(
            f"{sum(item.rows for item in written):,} rows in {time_s:.0f} s. Use them: trimtab validate --data {out}"
        )
