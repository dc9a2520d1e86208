"""``trimtab papers``: the ninety papers and what has been built of them."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def papers(
        name: Annotated[str | None, typer.Argument(help="Number or short name: show one paper.")] = None,
        family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """List the papers, or show one."""
        from trimtab.errors import unknown
        from trimtab.papers.catalogue import find_paper, load_papers
        from trimtab.ui.output import print_json, print_table

        rows = [find_paper(name)] if name else list(load_papers())
        if family:
            known = {row["family"] for row in rows}
            if family not in known:
                raise unknown("family", family, known)
            rows = [row for row in rows if row["family"] == family]
        if json:
            return print_json(rows[0] if name else rows)
        if name:
            return print_table(("field", "value"), [(key, str(value)) for key, value in rows[0].items()])
        columns = ("number", "short", "year", "family", "state", "title")
        print_table(
            tuple(f">{c}" if c == "number" else c for c in columns),
            [[str(row.get(c, "")) for c in columns] for row in rows],
        )
