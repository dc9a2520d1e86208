"""``trimtab models``: the models whose shapes ship with Trimtab."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def models(
        name: Annotated[str | None, typer.Argument(help="Id, alias, folder or .gguf file: show one model.")] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """List models, or show the shape, parameters and bytes of one."""
        from trimtab.ui.catalogues import model_row, model_rows
        from trimtab.ui.output import print_json, print_table
        from trimtab.units import format_bytes, format_si

        rows = [model_row(name)] if name else model_rows()
        if json:
            return print_json(rows[0] if name else rows)
        shown = [
            (row["id"], "", "", "", "", "", "", row["why"])
            if "why" in row
            else (
                row["id"],
                row["family"],
                format_si(row["num_parameters"]),
                "" if row["active_parameters"] == row["num_parameters"] else format_si(row["active_parameters"]),
                str(row["num_hidden_layers"]),
                format_bytes(row["weight_bytes"]),
                format_bytes(row["kv_bytes_per_token"]),
                f"context {row['max_position_embeddings']:,}",
            )
            for row in rows
        ]
        print_table(("id", "family", ">parameters", ">active", ">layers", ">weights", ">KV/token", "note"), shown)
