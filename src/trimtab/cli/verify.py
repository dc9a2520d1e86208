"""``trimtab verify``: re-check the claims of papers, here and now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def verify(
        papers: Annotated[
            list[str] | None, typer.Argument(help="Numbers or short names; default: every paper with checks.")
        ] = None,
        data: Annotated[
            Path | None, typer.Option(help="Folder of the optional texts (cfi_public.txt, handbook_public.txt, ...).")
        ] = None,
        strict: Annotated[bool, typer.Option("--strict", help="Fail on everything that is not met.")] = False,
        json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Print paper | predicted | measured here for every line; exit 1 on any plain miss."""
        import sys

        from trimtab.papers.claims import Bench, failed, summary
        from trimtab.papers.verify import verify as run
        from trimtab.ui.output import print_json, print_table

        rows = []
        for row in run(papers or [], Bench(data=data)):
            rows.append(row)
            print(f"{row.paper} {row.id}: {row.status} ({row.time_s:.1f} s)", file=sys.stderr)
        if json:
            print_json({"schema": 1, "rows": [row.to_dict() for row in rows], "summary": summary(rows)})
        else:
            columns = ("paper", "line", "claim", "needed", "predicted", "measured here", "status")
            shown = [(str(r.paper), r.id, r.text, r.needed, r.predicted, r.measured, r.status) for r in rows]
            print_table(columns, shown)
            typer.echo(summary(rows))
        if failed(rows, strict=strict):
            raise typer.Exit(1)
