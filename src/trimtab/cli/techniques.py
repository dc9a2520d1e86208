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
        import dataclasses
        import inspect

        from trimtab.techniques.registry import param_name, technique_class, technique_names
        from trimtab.ui.output import print_json, print_table

        rows = []
        for key in [technique_class(name).name] if name else technique_names():
            cls = technique_class(key)
            parameters = [
                {"name": param_name(f), "type": str(f.type), "default": f.default, **f.metadata}
                for f in dataclasses.fields(cls)
            ]
            rows.append(
                {
                    "name": key,
                    "summary": cls.summary,
                    "seam": cls.__module__.split(".")[-2],
                    "stage": cls.stage.name.lower(),
                    "needs": sorted(cls.needs),
                    "paper": cls.paper,
                    "parameters": parameters,
                    "doc": inspect.getdoc(cls),
                }
            )
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
