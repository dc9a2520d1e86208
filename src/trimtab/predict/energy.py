"""Joules of a request and of a token."""

from __future__ import annotations

from trimtab.spec.machine import Machine
from trimtab.spec.report import Figure


def energy(machine: Machine, time_s: float | None, band: tuple[float, float], devices: int = 1) -> Figure:
    """Energy of `time_s` seconds at the power limit of `devices`: an upper estimate, since memory-bound work draws less.

    Args:
        machine: its `tdp_w`.
        time_s: seconds of the whole request.
        band: P10 and P90 of measured over predicted time.
        devices: how many of them.
    """
    if machine.tdp_w is None or time_s is None:
        return Figure(
            value=None,
            unit="J",
            kind="datasheet",
            why=f"{machine.id} has no power limit in the catalogue, so there is no source.",
        )
    joules = machine.tdp_w * devices * time_s
    many = f"{devices} x " if devices > 1 else ""
    why = (
        f"tdp_w x time = {many}{machine.tdp_w:g} W x {time_s:.4g} s: the device alone, at its power limit all the time. "
        f"Memory-bound work draws less, how much less has no source, hence no P10. "
        f"Source: {machine.sources.get('tdp_w') or machine.source}"
    )
    return Figure(value=joules, p90=joules * band[1], unit="J", kind="datasheet", why=why)


def joules_per_token(
    machine: Machine, tokens_per_s: float | None, band: tuple[float, float], devices: int = 1
) -> Figure:
    """Energy of one decoded token at the power limit, all sequences sharing the devices."""
    if machine.tdp_w is None or tokens_per_s is None:
        why = "Nothing is decoded after the first token (gen=1)."
        if machine.tdp_w is None:
            why = f"{machine.id} has no power limit in the catalogue, so there is no source."
        return Figure(value=None, unit="J/token", kind="datasheet", why=why)
    joules = machine.tdp_w * devices / tokens_per_s
    many = f"{devices} x " if devices > 1 else ""
    why = (
        f"tdp_w / tokens_per_s = {many}{machine.tdp_w:g} W / {tokens_per_s:.4g}: an upper estimate as for energy_j. "
        f"Source: {machine.sources.get('tdp_w') or machine.source}"
    )
    return Figure(value=joules, p90=joules * band[1], unit="J/token", kind="datasheet", why=why)
