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
        from trimtab.errors import UnsupportedModelError
        from trimtab.spec.configs import active_parameters, load_spec, model_ids
        from trimtab.spec.nodes import AttentionSpec, LatentAttentionSpec
        from trimtab.ui.output import print_json, print_table
        from trimtab.units import format_bytes, format_si

        rows = []
        for key in [name] if name else model_ids():
            try:
                spec = load_spec(key)
            except UnsupportedModelError as error:
                if name:
                    raise
                rows.append({"id": key, "family": "", "why": str(error)})
                continue
            mixers = (layer.self_attn for layer in spec.layers)
            attention = next((m for m in mixers if isinstance(m, AttentionSpec | LatentAttentionSpec)), None)
            rows.append(
                {
                    "id": spec.name,
                    "family": spec.family,
                    "num_parameters": spec.num_parameters(),
                    "active_parameters": active_parameters(spec),
                    "num_hidden_layers": spec.num_hidden_layers,
                    "hidden_size": spec.hidden_size,
                    "num_attention_heads": attention.num_attention_heads if attention else 0,
                    "num_key_value_heads": len(attention.cache.heads) if attention else 0,
                    "vocab_size": spec.vocab_size,
                    "max_position_embeddings": spec.max_position_embeddings,
                    "weight_bytes": spec.weight_nbytes(),
                    "kv_bytes_per_token": spec.kv_nbytes(1) - spec.state_nbytes(),
                    "state_bytes": spec.state_nbytes(),
                    "hash": spec.hash,
                }
            )
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
