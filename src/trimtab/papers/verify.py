"""Which papers have checks, and running them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence

from trimtab.errors import SpecError
from trimtab.papers.catalogue import find_paper
from trimtab.papers.claims import Bench, Line, Row, run_lines

#: Paper number -> module with ``LINES``.
CHECKS = {
    1: "trimtab.papers.roofline",
    7: "trimtab.papers.idealized_runtime",
    13: "trimtab.papers.bipolar",
    14: "trimtab.papers.frontier",
    16: "trimtab.papers.duoattention",
    29: "trimtab.papers.lmul",
    32: "trimtab.papers.llm_int8",
    34: "trimtab.papers.flashdecpp",
    39: "trimtab.papers.tmac",
    43: "trimtab.papers.bitmod",
    49: "trimtab.papers.kivi",
    51: "trimtab.papers.shiftadd",
    52: "trimtab.papers.gemfilter",
    60: "trimtab.papers.cats",
    61: "trimtab.papers.scbench",
    63: "trimtab.papers.vattention",
    66: "trimtab.papers.think",
    76: "trimtab.papers.olive",
    83: "trimtab.papers.bfp_ksort",
}


def lines_of(asked: str) -> tuple[int, Sequence[Line]]:
    """Return (number, lines) of a paper.

    Raises:
        SpecError: no such paper, or none of its lines can be checked yet.
    """
    paper = find_paper(asked)
    number = int(paper["number"])
    if number not in CHECKS:
        known = ", ".join(str(n) for n in CHECKS)
        raise SpecError(
            f"Paper {number} ({paper['short']}) is {paper['state']}; it has no checks yet. Papers with checks: {known}."
        )
    return number, importlib.import_module(CHECKS[number]).LINES


def verify(asked: Sequence[str], bench: Bench) -> Iterator[Row]:
    """Yield the rows of several papers; every name is checked before the first line runs."""
    chosen = [lines_of(name) for name in asked or [str(number) for number in CHECKS]]
    for number, lines in chosen:
        yield from run_lines(number, lines, bench)
