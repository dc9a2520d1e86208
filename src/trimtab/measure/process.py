"""Meters of this process that need no torch."""

from __future__ import annotations

from pathlib import Path


def rss_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process, now or at its highest, from /proc/self/status; 0 where there is none."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)), 0)
