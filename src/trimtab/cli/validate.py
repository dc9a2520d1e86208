"""``trimtab validate``: predictions beside what others recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def validate(
        data: Annotated[
            Path | None,
            typer.Option("--data", metavar="FOLDER", help="Folder with more recorded tables (`import-aic`)."),
        ] = None,
        table: Annotated[str | None, typer.Option("--table", metavar="NAME", help="One table; default all.")] = None,
        device: Annotated[
            str | None, typer.Option("--device", metavar="MACHINE", help="Machine id or alias; default all.")
        ] = None,
        json: Json = False,
    ) -> None:
        """Check predictions against recorded hardware; exit code 1 if an error passes its limit."""
        from trimtab.measure.recorded.scoreboard import COLUMNS, as_json, passed, table_rows
        from trimtab.measure.recorded.validate import validate as run
        from trimtab.spec.machine import aliases
        from trimtab.ui.output import print_json, print_table

        lines = run(data, table, aliases().get(device.lower(), device) if device else None)
        if json:
            print_json(as_json(lines))
        else:
            print_table(COLUMNS, table_rows(lines))
            typer.echo(
                "Errors are of predicted over measured, on rows the constants were not fitted on (* = fitted on them too). In "
                "band: within the P10 and P90 a prediction comes with; 80 is what to expect. Roofline: MAPE of the datasheet."
            )
            failed = [line for line in lines if not line.ok]
            above = sum(line.above_measured for line in lines)
            typer.echo(
                f"{len(lines) - len(failed)} of {len(lines)} lines are within their limits; {above} rows are faster than "
                "the datasheet allows with a working set above twice the last-level cache."
            )
        if not passed(lines):
            raise typer.Exit(1)
