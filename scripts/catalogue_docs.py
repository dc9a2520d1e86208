"""Write docs/machines.md and docs/models.md from the catalogues; with --check, fail if they are stale.

Usage: python scripts/catalogue_docs.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.data import root
from trimtab.errors import UnsupportedModelError
from trimtab.spec.configs import active_parameters, load_spec

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEADER = "<!-- Written by scripts/catalogue_docs.py from the catalogues in src/trimtab/data; do not edit. -->\n"

#: Fields of a machine that are words about it, not facts with a source of their own.
PROSE = ("name", "vendor", "kind", "aliases", "source", "confidence", "sources", "notes", "price_basis", "flops_per_s")

MACHINES_INTRO = """
# Machines

Every number of the catalogue with its source. Confidence: `high` = found in the source named; `med` = vendor sheet
from memory, consistent with a second source; `low` = from memory or derived, so check it before a claim.

Peaks are dense (no sparsity) with fp32 accumulation: 1 TFLOP/s = 10^12 FLOP/s, a multiply-add is 2 FLOP; integer
formats count OP/s. Bytes and bandwidths are decimal, as datasheets give them (80 GB = 80 * 10^9 B); link speeds are
per direction. Prices are indicative (2024-2026) and can be overridden. A missing row means that the figure is unknown.
"""

MODELS_INTRO = """
# Models

Shape facts of the models Trimtab knows without a network: Hugging Face `config.json` keys, kept in
`src/trimtab/data/models`. Parameters are counted from the shapes, embeddings, norms and biases included, a tied head
once; `active` is what one token meets (of the experts only the chosen ones), KV bytes are those of the first token in
the dtype of the model. An empty cell means that Trimtab cannot build this family yet. Heads are query heads / KV heads
x head size; `ffn` is the width of one dense or routed expert MLP. Any other model of a known family works from its own
`config.json` or GGUF file.
"""


def machine_tables() -> dict[str, dict[str, Any]]:
    """Return every machine table by id, in the order of the files."""
    tables: dict[str, dict[str, Any]] = {}
    for path in sorted((root() / "machines").glob("*.toml")):
        tables.update(tomllib.loads(path.read_text("utf-8")))
    return tables


def quantity(field: str, value: Any) -> str:
    """Print a figure with its unit, without rounding."""
    if field.startswith("flops_per_s."):
        unit = "TOP/s" if field.partition(".")[2].startswith("int") else "TFLOP/s"
        return f"{value / 1e12:g} {unit}"
    if field.endswith(("bytes_per_s", "bytes_per_s_per_dir")):
        return f"{value / 1e9:.10g} GB/s"
    if field.endswith("bytes"):
        return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"
    if field.endswith("_w"):
        return f"{value:g} W"
    if field == "list_usd":
        return f"{value:g} USD"
    if field == "usd_per_h":
        return f"{value:g} USD/h"
    return str(value)


def facts(table: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (field, value, source, confidence) for each fact of a machine."""
    plain = {name: value for name, value in table.items() if name not in PROSE}
    plain |= {f"flops_per_s.{dtype}": value for dtype, value in table["flops_per_s"].items()}
    default = f"{table['confidence']}: {table['source']}"
    for name, value in plain.items():
        confidence, _, source = table.get("sources", {}).get(name, default).partition(": ")
        yield name, quantity(name, value), source, confidence


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def machines_page() -> str:
    """Return docs/machines.md."""
    tables = machine_tables()

    def row(key: str, table: Mapping[str, Any]) -> list[str]:
        peaks = table["flops_per_s"]
        best = next(dtype for dtype in ("bf16", "fp16", "fp32", "int8") if dtype in peaks)
        return [
            f"[{key}](#{key})",
            ", ".join(table["aliases"]),
            f"{quantity(f'flops_per_s.{best}', peaks[best])} {best}",
            quantity("memory_bytes", table["memory_bytes"]),
            quantity("memory_bandwidth_bytes_per_s", table["memory_bandwidth_bytes_per_s"]),
            quantity("usd_per_h", table["usd_per_h"]) if "usd_per_h" in table else "",
        ]

    parts = [HEADER, MACHINES_INTRO, f"\n{len(tables)} machines.\n"]
    head = ("id", "aliases", "peak", "memory", "bandwidth", "price")
    parts.append(grid(head, (row(*item) for item in tables.items())))
    for key, table in tables.items():
        parts.append(f"\n## {key}\n\n{table['name']}, {table['vendor']}, {table['kind']}.")
        parts.append(f"{table['notes'][0].upper()}{table['notes'][1:]}.\n" if "notes" in table else "\n")
        parts.append(grid(("field", "value", "source", "confidence"), facts(table)))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def models_page() -> str:
    """Return docs/models.md."""
    rows: list[list[str]] = []
    sources: dict[tuple[str, str], list[str]] = {}
    for path in sorted((root() / "models").glob("*.json")):
        table = json.loads(path.read_text("utf-8"))
        rows.append(model_row(path.stem, table))
        sources.setdefault((table["_source"], table["_confidence"]), []).append(path.stem)
    head = (
        "id",
        "also",
        "type",
        "parameters",
        "active",
        "KV B/token",
        "layers",
        "hidden",
        "heads",
        "ffn",
        "vocabulary",
        "context",
    )
    origin = grid(("source", "confidence", "models"), ([s, c, ", ".join(ids)] for (s, c), ids in sources.items()))
    parts = [HEADER, MODELS_INTRO, f"\n{len(rows)} models.\n", grid(head, rows), "\n## Sources\n", origin]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def model_row(key: str, table: Mapping[str, Any]) -> list[str]:
    """Return one row of the models table."""
    config = table.get("text_config", table)

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    kv_heads = first("num_key_value_heads") or heads
    head_dim = first("head_dim", "attention_head_dim", "v_head_dim") or hidden // heads
    ffn = first("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    context = first("max_position_embeddings", "n_positions", "seq_length")
    experts = first("num_local_experts", "num_experts", "n_routed_experts")
    top_k = first("num_experts_per_tok", "top_k_experts")
    return [
        key,
        ", ".join(table["_aliases"]),
        config["model_type"],
        *counted(key),
        str(first("num_hidden_layers", "n_layer")),
        str(hidden),
        f"{heads}/{kv_heads} x {head_dim}",
        f"{ffn} ({top_k} of {experts} experts)" if experts else str(ffn),
        str(config["vocab_size"]),
        str(context),
    ]


def counted(key: str) -> list[str]:
    """Return parameters, active parameters and KV bytes of a token; nothing for a family Trimtab cannot build yet."""
    try:
        spec = load_spec(key)
    except UnsupportedModelError:
        return ["", "", ""]
    return [
        f"{number:,}"
        for number in (spec.num_parameters(), active_parameters(spec), spec.kv_nbytes(1) - spec.state_nbytes())
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or compare them with what is on disk; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page differs from the catalogues")
    check = parser.parse_args(argv).check
    stale = []
    for name, page in (("machines.md", machines_page()), ("models.md", models_page())):
        path = DOCS / name
        if path.exists() and path.read_text("utf-8") == page:
            continue
        stale.append(name)
        if not check:
            DOCS.mkdir(exist_ok=True)
            path.write_text(page, "utf-8")
    if check and stale:
        pages = " and ".join(f"docs/{name}" for name in stale)
        print(f"{pages}: not what the catalogues say. Run: python scripts/catalogue_docs.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
