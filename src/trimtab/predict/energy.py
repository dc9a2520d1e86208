"""Joules of a request."""

from __future__ import annotations

from trimtab.spec.machine import Machine
from trimtab.spec.report import Figure


def energy(machine: Machine, time_s: float | None, band: tuple[float, float]) -> Figure:
    """Energy of `time_s` seconds at the machine's power limit: an upper estimate, since memory-bound work draws less.

    Args:
        machine: its `tdp_w`.
        time_s: seconds of the whole request.
        band: P10 and P90 of measured over predicted time.
    """
    if machine.tdp_w is None or time_s is None:
        return Figure(
            value=None,
            unit="J",
            kind="datasheet",
            why=f"{machine.id} has no power limit in the catalogue, so there is no source.",
        )
    joules = machine.tdp_w * time_s
    why = (
        f"tdp_w x time = {machine.tdp_w:g} W x {time_s:.4g} s: the device alone, at its power limit all the time. Memory-bound work "
        f"draws less, how much less has no source, hence no P10. Source: {machine.sources.get('tdp_w') or machine.source}"
    )
    return Figure(value=joules, p90=joules * band[1], unit="J", kind="datasheet", why=why)
