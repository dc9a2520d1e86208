"""``trimtab techniques``: what can be applied, and with which parameters."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def techniques(
        name: Annotated[str | None, typer.Argument(help="Show the parameters of one technique.")] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """List techniques, or show one with its parameters, defaults and allowed values."""
        from trimtab.ui.catalogues import technique_row, technique_rows
        from trimtab.ui.output import print_json, print_table

        rows = [technique_row(name)] if name else technique_rows()
        if json:
            return print_json(rows[0] if name else rows)
        if not name:
            listed = [
                (r["name"], r["seam"], str(r["paper"] or "baseline"), ", ".join(r["needs"]), r["summary"]) for r in rows
            ]
            return print_table(("name", "seam", ">paper", "needs", "what it does"), listed)
        row = rows[0]
        typer.echo(f"{row['name']}: {row['doc']}\n")
        table = [(p["name"], str(p["default"]), p["allowed"], p["help"]) for p in row["parameters"]]
        print_table(("parameter", "default", "allowed", "meaning"), table)
