"""``trimtab machines``: the catalogue of hardware."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def machines(
        name: Annotated[str | None, typer.Argument(help="Id or alias: show one machine with its sources.")] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """List machines, or show one with the source of every number."""
        import dataclasses

        from trimtab.spec.machine import aliases, load_machine, machine_ids
        from trimtab.ui.output import print_json, print_table
        from trimtab.units import format_si

        if name:
            machine = load_machine(name)
            facts = {k: v for k, v in dataclasses.asdict(machine).items() if v not in (None, (), "") and k != "sources"}
            if json:
                return print_json({**facts, "sources": dict(machine.sources)})
            rows = []
            for key, value in facts.items():
                origin = machine.sources.get(key, f"{machine.source} ({machine.confidence})")
                for label, item in value.items() if isinstance(value, dict) else ((key, value),):
                    shown = f"{item:,}" if isinstance(item, int | float) and key != "year" else str(item)
                    rows.append((f"{key}.{label}" if isinstance(value, dict) else key, shown, origin))
            return print_table(("field", ">value", "source"), rows)
        found = [load_machine(key) for key in machine_ids()]
        if json:
            return print_json([dataclasses.asdict(machine) for machine in found])
        short: dict[str, list[str]] = {}
        for alias, key in aliases().items():
            short.setdefault(key, []).append(alias)
        rows = [
            (
                machine.id,
                ", ".join(short.get(machine.id, ())),
                machine.kind,
                str(machine.year),
                format_si(machine.peak("bf16")[0], "FLOP/s") + f" {machine.peak('bf16')[1]}",
                f"{machine.memory_bytes / 1e9:g} GB",
                format_si(machine.memory_bandwidth_bytes_per_s, "B/s"),
                machine.confidence,
            )
            for machine in found
        ]
        print_table(("id", "alias", "kind", "year", ">dense peak", ">memory", ">bandwidth", "confidence"), rows)
