"""The Pareto front against its definition, row by row."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.measure.pareto import pareto

# Few distinct values, so that ties and equal rows are common; None and NaN are missing.
_VALUE = st.one_of(st.integers(-2, 2).map(float), st.none(), st.just(math.nan), st.just(math.inf))
_TABLE = st.integers(2, 4).flatmap(
    lambda width: st.tuples(
        st.lists(st.lists(_VALUE, min_size=width, max_size=width), max_size=14),
        st.lists(st.sampled_from(["min", "max"]), min_size=width, max_size=width),
    )
)


def _missing(row: list) -> bool:
    return any(value is None or math.isnan(value) for value in row)


def _dominates(a: list, b: list, senses: list) -> bool:
    better = [x < y if sense == "min" else x > y for x, y, sense in zip(a, b, senses, strict=True)]
    worse = [x > y if sense == "min" else x < y for x, y, sense in zip(a, b, senses, strict=True)]
    return any(better) and not any(worse)


@settings(max_examples=150, deadline=None)
@given(_TABLE)
def test_front_is_what_the_definition_says(case: tuple[list, list]) -> None:
    rows, senses = case
    front = pareto(rows, senses)
    whole = [index for index, row in enumerate(rows) if not _missing(row)]
    assert sorted(front.incomplete) == [index for index in range(len(rows)) if index not in whole]
    for index in range(len(rows)):
        over = [other for other in whole if index in whole and _dominates(rows[other], rows[index], senses)]
        assert bool(front.mask[index]) == (index in whole and not over)
        by = front.by[index]
        if over:
            assert by is not None and by in over and front.mask[by]
            assert by == min(other for other in over if front.mask[other])
        else:
            assert by is None


@settings(max_examples=50, deadline=None)
@given(_TABLE)
def test_every_table_with_a_complete_row_has_a_front(case: tuple[list, list]) -> None:
    rows, senses = case
    assert pareto(rows, senses).mask.any() == any(not _missing(row) for row in rows)
