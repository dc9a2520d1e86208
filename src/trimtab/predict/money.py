"""Dollars per million decoded tokens."""

from __future__ import annotations

from trimtab.spec.machine import Machine
from trimtab.spec.report import Figure


def usd_per_million_tokens(
    machine: Machine, tokens_per_s: float | None, band: tuple[float, float], devices: int = 1
) -> Figure:
    """Price of an hour over the tokens decoded in it.

    Args:
        machine: its `usd_per_h`.
        tokens_per_s: decoded tokens per second, whole batch.
        band: P10 and P90 of measured over predicted time; cost grows with time.
        devices: how many of them.
    """
    unit = "USD/Mtoken"
    if machine.usd_per_h is None:
        return Figure(
            value=None,
            unit=unit,
            kind="datasheet",
            why=f"{machine.id} has no hourly price in the catalogue, so there is no source.",
        )
    if tokens_per_s is None:
        return Figure(value=None, unit=unit, kind="datasheet", why="Nothing is decoded after the first token (gen=1).")
    usd = machine.usd_per_h * devices / 3600 / tokens_per_s * 1e6
    many = f"{devices} x " if devices > 1 else ""
    source = machine.sources.get("usd_per_h") or machine.price_basis or machine.source
    why = f"usd_per_h / 3600 / tokens_per_s x 1e6 = {many}{machine.usd_per_h:g} / 3600 / {tokens_per_s:.4g} x 1e6. Source: {source}"
    return Figure(value=usd, p10=usd * band[0], p90=usd * band[1], unit=unit, kind="datasheet", why=why)
