"""A page of the explorer as a reader sees it."""

from __future__ import annotations

import re
import time
from typing import Any


class Page:
    """A page with what it said and asked."""

    def __init__(self, page: Any, base: str) -> None:
        self.page, self.base = page, base
        self.console: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def go(self, parts: str = "") -> float:
        """Open an address; return the seconds until the first numbers."""
        self.page.goto("about:blank")
        begin = time.perf_counter()
        self.page.goto(f"{self.base}/ui/#{parts}")
        self.page.get_by_role("heading", level=1).wait_for()
        return time.perf_counter() - begin

    def settled(self) -> None:
        """Wait until nothing is being asked."""
        self.page.wait_for_timeout(80)  # what was typed has begun to be asked
        self.page.locator("[aria-busy=true], .busy").first.wait_for(state="detached", timeout=60_000)

    def field(self, label: str) -> Any:
        return self.page.get_by_label(label, exact=True)

    def quiet(self) -> None:
        """Nothing foreign was asked for, nothing went to the console."""
        assert self.console == []
        assert [url for url in self.asked if not url.startswith((self.base, "data:", "about:"))] == []


def three(text: str) -> float:
    """A printed number with its unit, in base units."""
    value, unit = re.fullmatch(r"\$?([\d.]+) ?(.*)", text.strip()).groups()  # type: ignore[union-attr]
    scales = {
        "Ti": 2**40, "Gi": 2**30, "Mi": 2**20, "Ki": 2**10, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "m": 1e-3, "µ": 1e-6,
    }  # fmt: skip
    scale = next((scales[p] for p in sorted(scales, key=len, reverse=True) if unit.startswith(p) and unit != p), None)
    return float(value) * (scale or scales.get(unit, 1.0))
