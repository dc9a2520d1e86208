"""Pages of the cache in C++: the codec of every form against the one on arrays, attention over them against float64.

Legend: G KV heads, N query heads, T tokens, S slots, H head size, W elements of a token that are stored, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from trimtab.runtime.cache.pages import decode, encode
from trimtab.runtime.kernels import _core
from trimtab.runtime.numerics import bfloat16_to_float32
from trimtab.spec.cache import PageFormat

pytestmark = pytest.mark.usefixtures("isa")

F32, F16, BF16, F8, GRID, BFP, TILED_F32, TILED_F16, TILED_BF16, TILED_GRID = range(10)
TILED = (TILED_F32, TILED_F16, TILED_BF16, TILED_GRID)
_FLOATS = {F32: "fp32", F16: "fp16", BF16: "bf16", TILED_F32: "fp32", TILED_F16: "fp16", TILED_BF16: "bf16"}


@dataclass(frozen=True)
class Form:
    """One form of page, in both spellings."""

    kind: int
    width: int
    page: int = 64
    bits: int = 0
    group: int = 0

    @property
    def code(self) -> tuple[int, int, int, int, int, int]:
        return self.kind, self.page, self.width, self.bits, self.group, 0

    @property
    def named(self) -> PageFormat:
        if self.kind in (GRID, TILED_GRID):
            return PageFormat(f"int{self.bits}", self.group, by_channel=self.kind == TILED_GRID)
        if self.kind == BFP:
            return PageFormat("bfp", self.group, bits=self.bits)
        return PageFormat("fp8" if self.kind == F8 else _FLOATS[self.kind])

    @property
    def nbytes(self) -> int:
        return -(-self.named.nbytes(self.page, self.width) // 64) * 64

    @property
    def step(self) -> int:
        """Tokens that are written together."""
        return self.group if self.kind == TILED_GRID else 1

    def __str__(self) -> str:
        kinds = ["f32", "f16", "bf16", "f8", "grid", "bfp", "tiled_f32", "tiled_f16", "tiled_bf16", "tiled_grid"]
        return f"{kinds[self.kind]}-{self.bits}-g{self.group}-w{self.width}-p{self.page}"


FORMS = [
    *(Form(kind, width, page) for kind in _FLOATS for width, page in ((64, 64), (39, 32), (80, 16))),
    *(Form(kind, 20, 7) for kind in (F32, F16, BF16, F8)),
    Form(F8, 64),
    *(Form(GRID, 64, 64, bits, group) for bits in (2, 4, 8) for group in (64, 32, 24, 5)),
    *(Form(GRID, 39, 7, bits, 16) for bits in (2, 4, 8)),
    *(Form(BFP, width, 16, bits, 4) for bits in (2, 3, 4, 8, 9, 16) for width in (64, 20)),
    *(Form(TILED_GRID, 64, 64, bits, group) for bits in (2, 4, 8) for group in (32, 16, 64, 8)),
    *(Form(TILED_GRID, width, 32, bits, 32) for bits in (2, 4, 8) for width in (39, 23, 80)),
]


class Paged:
    """Pages of G heads that lie anywhere, and the table of their addresses [G, M]."""

    def __init__(self, form: Form, heads: int, pages: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.form = form
        self.room = rng.integers(0, 256, (heads * pages + 1, form.nbytes), dtype=np.uint8)
        aligned = self.room.ctypes.data
        self.table = (aligned + rng.permutation(heads * pages) * form.nbytes).reshape(heads, pages).astype(np.int64)

    def write(self, first: int, x_GTW: np.ndarray) -> bool:
        return _core.encode_pages(self.form.code, self.table, first, x_GTW)

    def read(self, first: int, count: int) -> np.ndarray:
        out = np.full((len(self.table), count, self.form.width), np.nan, np.float32)
        _core.decode_pages(self.form.code, self.table, first, count, out)
        return out


def _values(heads: int, tokens: int, width: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((heads, tokens, width)) * np.exp2(rng.integers(-3, 4, (heads, 1, width)))
    x[:, ::7, ::5] = 0
    x[:, :, 1] = 0.7  # all alike: no step
    return x.astype(np.float32)


def _expected(form: Form, x_GTW: np.ndarray) -> np.ndarray:
    found = decode(form.named, encode(form.named, x_GTW), form.width)
    return bfloat16_to_float32(found) if found.dtype == np.uint16 else found.astype(np.float32)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_round_trip(form: Form) -> None:
    tokens = max(form.step, 2 * form.page + 5) // form.step * form.step
    x = _values(3, tokens, form.width)
    expected = _expected(form, x)
    paged = Paged(form, 3, 4)
    first = 5 if form.step == 1 else form.step
    assert paged.write(first, x)
    np.testing.assert_array_equal(paged.read(first, tokens), expected)
    np.testing.assert_array_equal(paged.read(first + 3, tokens - 4), expected[:, 3:-1])


@pytest.mark.parametrize("form", [form for form in FORMS if form.step == 1], ids=str)
def test_tokens_one_by_one_are_those_written_together(form: Form) -> None:
    x = _values(2, 2 * form.page, form.width)
    together, single = Paged(form, 2, 2), Paged(form, 2, 2, seed=9)
    together.write(0, x)
    for t in reversed(range(x.shape[1])):
        single.write(t, x[:, t : t + 1])
    np.testing.assert_array_equal(together.read(0, x.shape[1]), single.read(0, x.shape[1]))


@pytest.mark.parametrize("kind", [F8, BFP])
def test_every_magnitude(kind: int) -> None:
    """Ties, subnormals and what is beyond the largest number."""
    form = Form(kind, 64, 64, *((0, 0) if kind == F8 else (6, 2)))
    bits = np.linspace(0, 0x7F7FFFFF, 64 * 64, dtype=np.int64).astype(np.uint32)
    halves = np.ldexp(np.arange(4096) % 64 + 0.5, np.arange(4096) // 64 - 30).astype(np.float32)
    for x in (bits.view(np.float32), halves, -halves):
        rows = x.reshape(1, 64, 64)
        paged = Paged(form, 1, 1)
        assert paged.write(0, rows)
        found, expected = paged.read(0, 64), _expected(form, rows)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6, -1e6, 1e38])
@pytest.mark.parametrize("at", [0, 37, 63])
@pytest.mark.parametrize("form", [Form(GRID, 64, 64, 4, 64), Form(TILED_GRID, 64, 64, 2, 32)], ids=str)
def test_what_no_scale_expresses_is_reported(form: Form, bad: float, at: int) -> None:
    x = _values(1, 32, 64)
    x[0, 3, at] = bad
    if abs(bad) == 1e6:  # a scale of 2 bits reaches far: only a minimum is beyond fp16
        x[0, :, at] = bad
        x[0, 3] = bad
    assert not Paged(form, 1, 1).write(0, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_block_floats_have_exponents_of_finite_numbers_alone(bad: float) -> None:
    x = _values(1, 4, 64)
    x[0, 3, 17] = bad
    assert not Paged(Form(BFP, 64, 64, 4, 32), 1, 1).write(0, x)


@pytest.mark.parametrize("form", [form for form in FORMS if form.kind != TILED_GRID], ids=str)
def test_move_copies_what_is_stored(form: Form) -> None:
    x = _values(2, 3 * form.page, form.width)
    source, target = Paged(form, 2, 3), Paged(form, 2, 2, seed=5)
    assert source.write(0, x)
    slots = np.sort(
        np.random.default_rng(2).permuted(np.tile(np.arange(3 * form.page), (2, 1)), axis=1)[:, : form.page]
    )
    _core.move_pages(form.code, source.table, target.table, slots, 3)
    kept = np.take_along_axis(source.read(0, 3 * form.page), slots[:, :, None], axis=1)
    np.testing.assert_array_equal(target.read(3, form.page), kept)
    _core.move_pages(form.code, source.table, source.table, slots, 0)  # downwards in place
    np.testing.assert_array_equal(source.read(0, form.page), kept)


def test_refusals() -> None:
    grouped = Paged(Form(TILED_GRID, 64, 64, 2, 32), 1, 1)
    with pytest.raises(ValueError, match="share their scales"):
        _core.move_pages(grouped.form.code, grouped.table, grouped.table, np.zeros((1, 1), np.int64), 0)
    with pytest.raises(ValueError, match="whole groups"):
        grouped.write(0, _values(1, 16, 64))
    paged = Paged(Form(F32, 64), 1, 2)
    paged.table[0, 1] = 0
    with pytest.raises(ValueError, match="Head 0 has no page for slot 64"):
        paged.write(60, _values(1, 8, 64))
    with pytest.raises(ValueError, match="no page for slot 128"):
        paged.read(128, 1)
    for code in (
        (10, 64, 64, 0, 0, 0),
        (F32, 0, 64, 0, 0, 0),
        (GRID, 64, 64, 3, 64, 0),
        (TILED_F16, 24, 64, 0, 0, 0),
        (TILED_GRID, 48, 64, 2, 32, 0),
        (GRID, 64, 64, 4, 64, 512),
    ):
        with pytest.raises(ValueError, match="form|grid"):
            _core.decode_pages(code, paged.table, 0, 1, np.empty((1, 1, 64), np.float32))


def _padded(form: Form, x_GTW: np.ndarray) -> np.ndarray:
    """Filled up to whole groups of tokens."""
    more = -x_GTW.shape[1] % form.step
    return np.pad(x_GTW, ((0, 0), (0, more), (0, 0)), mode="edge")


class Head:
    """Keys and values of one KV head, [S, H], of which the first slots are sealed; what the pages stand for, in float64."""

    def __init__(
        self,
        k: Form,
        v: Form,
        k_sealed: Form | None = None,
        v_sealed: Form | None = None,
        *,
        slots: int = 150,
        sealed: tuple[int, int] = (0, 0),
        thin: int = 0,
        size: int = 64,
        seed: int = 3,
    ) -> None:
        rng = np.random.default_rng(seed)
        k_SH, v_SH = (rng.standard_normal((slots, size)).astype(np.float32) for _ in range(2))
        self.kinds = (k, v, k_sealed, v_sealed)
        self.forms = (k.code, v.code, k_sealed and k_sealed.code, v_sealed and v_sealed.code, 0, 0)
        self.record = np.zeros(16, np.int64)
        self.record[4], self.record[5], self.record[6], self.record[14] = slots, *sealed, slots
        self.kept: list[object] = []
        self.k_SH, self.v_SH = np.zeros((slots, size)), np.zeros((slots, size))
        channels = np.sort(rng.permutation(size)[: thin or size]).astype(np.uint8)
        for field, form, x, first, last, into, kept in (
            (0, k, k_SH, sealed[0], slots, self.k_SH, None),
            (1, v, v_SH, sealed[1], slots, self.v_SH, None),
            (2, k_sealed, k_SH, 0, sealed[0], self.k_SH, channels if thin else None),
            (3, v_sealed, v_SH, 0, sealed[1], self.v_SH, None),
        ):
            if form is None or first == last:
                continue
            paged = Paged(form, 1, -(-slots // form.page) + 1, seed=field)
            start = first // form.step * form.step
            part = _padded(
                form, x[None, start:last] if kept is None else np.ascontiguousarray(x[None, start:last, kept])
            )
            assert paged.write(start, part)
            found = paged.read(first, last - first)[0]
            into[first:last, slice(None) if kept is None else kept] = found
            paged.table[0, : first // form.page] = 0  # pages of slots that are read elsewhere are gone
            self.record[field] = paged.table.ctypes.data
            self.kept.append(paged)
        if thin:
            self.record[9] = channels.ctypes.data
            self.kept.append(channels)

    def point(self, field: int, array: np.ndarray) -> None:
        self.kept.append(array)
        self.record[field] = array.ctypes.data

    def attend(
        self,
        q_QH: np.ndarray,
        low: np.ndarray | None = None,
        high: np.ndarray | None = None,
        first: int = 0,
        last: int | None = None,
        *,
        positions: np.ndarray | None = None,
        ring: tuple[int, int] = (0, 0),
        scale: float = 0.125,
        softcap: float = 0.0,
        phi: float | None = None,
        turned: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = len(q_QH)
        out, weight, largest = (
            np.empty(q_QH.shape, np.float32),
            np.empty(count, np.float32),
            np.empty(count, np.float32),
        )
        slots = len(self.k_SH)
        _core.attend_heads(
            q_QH, self.record, self.forms, first, slots if last is None else last,
            np.zeros(count, np.int64) if low is None else low, np.full(count, slots) if high is None else high,
            positions, ring[1], ring[0], scale, softcap, phi, out, weight, largest, turned,
        )  # fmt: skip
        return out, weight, largest

    def expected(
        self, q_QH: np.ndarray, seen_QS: np.ndarray, scale: float = 0.125, softcap: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attention [Q, H], and the logarithm of the sum of its weights [Q]."""
        scores = q_QH.astype(np.float64) @ self.k_SH.T * scale
        if softcap:
            scores = np.tanh(scores / softcap) * softcap
        scores = np.where(seen_QS, scores, -np.inf)
        top = scores.max(axis=1, keepdims=True)
        p = np.exp(scores - top)
        total = p.sum(axis=1, keepdims=True)
        return p @ self.v_SH / total, (np.log(total) + top)[:, 0]


def _rtol(*forms: Form | None) -> float:
    """Floats are multiplied as floats; with AVX-512 codes of few bits take a query, or weights, in 16-bit integers."""
    few = any(form is not None and form.kind in (GRID, TILED_GRID) and form.bits < 8 for form in forms)
    return 3e-4 if few and _core.isa() == "avx512" else 1e-5


def _queries(count: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(11).standard_normal((count, size)).astype(np.float32)


def _check(head: Head, q_QH: np.ndarray, seen_QS: np.ndarray, **options: object) -> None:
    """Both kernels, with a running maximum and with one maximum for all."""
    rtol = _rtol(*head.kinds)
    math = {name: options[name] for name in ("scale", "softcap") if name in options}
    expected, total = head.expected(q_QH, seen_QS, **math)  # type: ignore[arg-type]
    bound = np.abs(expected).max() * rtol
    for turned in (False, True):
        for phi in (None, 0.5):
            out, weight, largest = head.attend(q_QH, turned=turned, phi=phi, **options)  # type: ignore[arg-type]
            np.testing.assert_allclose(out / weight[:, None], expected, rtol=0, atol=bound)
            base = largest if phi is None else np.full_like(largest, phi)
            np.testing.assert_allclose(np.log(weight.astype(np.float64)) + base, total, rtol=0, atol=2 * rtol)


_ALL = (
    Form(F32, 64), Form(F16, 64), Form(BF16, 64), Form(F8, 64), Form(GRID, 64, 64, 8, 64), Form(GRID, 64, 64, 4, 32),
    Form(GRID, 64, 64, 2, 16), Form(GRID, 64, 64, 2, 24), Form(BFP, 64, 64, 4, 32), Form(TILED_F32, 64), Form(TILED_F16, 64),
    Form(TILED_BF16, 64), Form(TILED_GRID, 64, 64, 2, 32), Form(TILED_GRID, 64, 64, 4, 16), Form(TILED_GRID, 64, 64, 8, 64),
    Form(TILED_GRID, 64, 64, 4, 8),
)  # fmt: skip


@pytest.mark.parametrize("k", _ALL, ids=str)
@pytest.mark.parametrize("v", _ALL, ids=str)
def test_every_pair_of_forms(k: Form, v: Form) -> None:
    """All tokens but the newest are sealed, keys and values up to different slots."""
    head = Head(Form(F32, 64), Form(F32, 64), k, v, sealed=(128, 128 - v.step % 128))
    q, low, high = _queries(7), np.array([0, 3, 0, 70, 17, 0, 0]), np.array([150, 150, 149, 150, 80, 1, 129])
    slots = np.arange(150)
    seen = (slots >= low[:, None]) & (slots < high[:, None])
    _check(head, q, seen, low=low, high=high)


@pytest.mark.parametrize(
    "landing",
    [Form(F32, 64), Form(BF16, 64, 16), Form(F16, 64, 32), Form(GRID, 64, 64, 8, 64), Form(BFP, 64, 7, 4, 32)],
    ids=str,
)
@pytest.mark.parametrize("slots", [1, 5, 64, 150])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 50])
def test_landing_pages_alone(landing: Form, slots: int, count: int) -> None:
    head = Head(landing, landing, slots=slots)
    _check(head, _queries(count), np.ones((count, slots), bool))


@pytest.mark.parametrize("size", [16, 48, 80, 128, 256])
def test_head_sizes(size: int) -> None:
    k, v = Form(TILED_GRID, size, 64, 2, 32), Form(GRID, size, 64, 2, 32)
    for landing in (Form(F32, size), Form(BF16, size)):
        head = Head(landing, landing, k, v, sealed=(96, 100), size=size)
        _check(head, _queries(4, size), np.ones((4, 150), bool))


_THIN = (
    Form(TILED_BF16, 39), Form(TILED_F32, 39), Form(TILED_F16, 64), Form(F32, 39), Form(BF16, 40, 16),
    Form(TILED_GRID, 39, 64, 2, 32), Form(TILED_GRID, 45, 64, 4, 32), Form(TILED_GRID, 39, 64, 4, 32),
    Form(TILED_GRID, 43, 32, 8, 16), Form(GRID, 48, 64, 4, 32), Form(GRID, 39, 64, 8, 39),
)  # fmt: skip


@pytest.mark.parametrize("sealed", _THIN, ids=str)
def test_thin_keys(sealed: Form) -> None:
    head = Head(Form(BF16, 64), Form(BF16, 64), sealed, Form(F32, 64), sealed=(96, 0), thin=sealed.width)
    _check(head, _queries(7), np.ones((7, 150), bool))


@pytest.mark.parametrize("piece", [1, 8, 16, 24, 32])
@pytest.mark.parametrize("form", [Form(F32, 64), Form(BF16, 64), Form(TILED_GRID, 64, 64, 4, 32)], ids=str)
def test_chosen_pieces(form: Form, piece: int) -> None:
    v = Form(GRID, 64, 64, 4, 32)
    head = Head(Form(F32, 64), Form(F32, 64), form, v, sealed=(128, 96))
    pieces = -(-150 // piece)
    chosen = np.sort(np.random.default_rng(5).permutation(pieces)[: max(2, pieces // 3)]).astype(np.int32)
    head.point(11, chosen)
    head.record[12], head.record[13] = len(chosen), piece
    seen = np.isin(np.arange(150) // piece, chosen)
    _check(head, _queries(4), np.tile(seen, (4, 1)))


def test_positions_and_ring() -> None:
    """Slots of a ring that has wrapped: the newest tokens stand in the middle."""
    head = Head(Form(F32, 64), Form(BF16, 64))
    positions = np.concatenate((np.arange(4), 200 + (np.arange(146) + 90) % 146)).astype(np.int32)
    head.point(10, positions)
    now = np.array([345, 300, 210, 400, 3])
    for sink, recent in ((4, 60), (4, 120), (0, 146), (0, 0)):
        seen = positions <= now[:, None]
        if recent:
            seen &= (positions < sink) | (positions > now[:, None] - recent)
        keep = seen.any(axis=1)
        _check(head, _queries(5)[keep], seen[keep], positions=now[keep], ring=(sink, recent))


def test_ranges_join_to_the_whole() -> None:
    head = Head(
        Form(F32, 64), Form(F32, 64), Form(TILED_GRID, 64, 64, 2, 32), Form(GRID, 64, 64, 2, 32), sealed=(96, 110)
    )
    q = _queries(3)
    whole, total, _ = head.attend(q, phi=0.0)
    parts = [head.attend(q, first=a, last=b, phi=0.0) for a, b in ((0, 7), (7, 40), (40, 96), (96, 96), (96, 150))]
    np.testing.assert_allclose(
        sum(part[0] for part in parts), whole, rtol=0, atol=_rtol(*head.kinds) * np.abs(whole).max()
    )
    np.testing.assert_allclose(sum(part[1] for part in parts), total, rtol=_rtol(*head.kinds))


def test_cap_and_scale() -> None:
    head = Head(Form(BF16, 64), Form(F16, 64), Form(TILED_GRID, 64, 64, 8, 32), None, sealed=(64, 0))
    _check(head, 3 * _queries(7), np.ones((7, 150), bool), scale=0.3, softcap=5.0)


def test_what_lies_behind_the_last_token_does_not_matter() -> None:
    """Pages hold anything there, NaN and infinity too."""
    for form in _ALL:
        tail = Form(F32, 64) if form.step > 1 else form
        head = Head(
            tail, tail, form, form, slots=64 if form.step > 1 else 37, sealed=(64, 64) if form.step > 1 else (0, 0)
        )
        high = np.array([37, 20, 1])
        seen = np.arange(len(head.k_SH)) < high[:, None]
        _check(head, _queries(3), seen, high=high)


#: Query heads, KV heads and head size of the programs below.
_N, _G, _H = 6, 2, 64


Forms = tuple[Form, Form, Form | None, Form | None]


class Cache:
    """Pages of B rows of _G KV heads, and the record of each; room for `slots` tokens. Columns are keys, values, sealed ones."""

    def __init__(self, forms: Forms, rows: int, slots: int) -> None:
        self.forms = forms
        self.columns = {
            field: Paged(form, rows * _G, -(-slots // form.page), seed=field)
            for field, form in enumerate(forms)
            if form
        }
        self.records = np.zeros((1, rows, _G, 16), np.int64)
        for field, paged in self.columns.items():
            starts = np.arange(rows * _G).reshape(rows, _G) * paged.table[0].nbytes
            self.records[0, :, :, field] = paged.table.ctypes.data + starts

    def codes(self, ring: tuple[int, int] = (0, 0)) -> list[Any]:
        return [(*(form and form.code for form in self.forms), *ring)] * _G

    def read(self, row: int, sealed: tuple[int, int], slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [G, slots, H] of one row."""
        found = []
        for landing, coded, border in ((0, 2, sealed[0]), (1, 3, sealed[1])):
            parts = []
            for column, first, last in ((coded, 0, border), (landing, border, slots)):
                if first < last:
                    parts.append(self.columns[column].read(first, last - first)[row * _G : (row + 1) * _G])
            found.append(np.concatenate(parts, axis=1))
        return found[0], found[1]


class Runner:
    """A program that is one layer of attention: in are queries, keys and values side by side."""

    def __init__(
        self,
        cache: Cache,
        threads: int = 1,
        window: int = 0,
        unified: tuple[float, float, float] | None = None,
        split: int = 0,
        ring: tuple[int, int] = (0, 0),
    ) -> None:
        self.cache, self.core = cache, _core.Program(threads)
        self.qkv, self.out = self.core.values((_N + 2 * _G) * _H, False), self.core.values(_N * _H, False)
        self.core.attend_heads(
            "attend", 0, self.qkv, self.out, -1, _N, _G, _H, window, cache.codes(ring), None, None, 0.125, 0.0, unified, True
        )  # fmt: skip
        self.core.split(split)

    def run(self, x_TNH: np.ndarray, starts: list[int], past: list[int]) -> np.ndarray:
        out = np.full((len(x_TNH), _N * _H), np.nan, np.float32)
        self.core.run_on(
            np.array(starts), np.array(past), self.cache.records, self.qkv, x_TNH.reshape(len(x_TNH), -1), self.out, out
        )
        return out.reshape(-1, _N, _H)


def _tokens(count: int, seed: int = 21) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, _N + 2 * _G, _H)).astype(np.float32)


def _attention(q_NH: np.ndarray, k_GSH: np.ndarray, v_GSH: np.ndarray, seen_S: np.ndarray) -> np.ndarray:
    """One token, float64 [N, H]."""
    per = _N // _G
    scores = np.einsum("gph,gsh->gps", q_NH.reshape(_G, per, _H).astype(np.float64), k_GSH.astype(np.float64)) * 0.125
    scores = np.where(seen_S, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (np.einsum("gps,gsh->gph", p, v_GSH.astype(np.float64)) / p.sum(axis=-1, keepdims=True)).reshape(_N, _H)


_KIVI: Forms = (Form(F32, 64), Form(F32, 64), Form(TILED_GRID, 64, 64, 2, 32), Form(GRID, 64, 64, 2, 32))
_PLAIN: Forms = (Form(F32, 64), Form(F32, 64), None, None)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("unified", [None, (0.0, -60.0, 60.0), (0.0, -1e-3, 1e-3)])
@pytest.mark.parametrize(
    "forms",
    [_PLAIN, (Form(BF16, 64, 16), Form(GRID, 64, 32, 8, 64), None, None), _KIVI],
    ids=lambda forms: "+".join(map(str, forms)),
)
def test_program_appends_attends_and_seals(
    forms: Forms,
    unified: tuple[float, float, float] | None,
    window: int,
    threads: int,
) -> None:
    """Three rows that grow by prompts, chunks and single tokens; keys leave in groups of 32, values one by one."""
    cache = Cache(forms, 3, 256)
    runner = Runner(cache, threads, window, unified, split=48)
    seals, past, sealed = forms[2] is not None, np.zeros(3, int), np.zeros((3, 2), int)
    for step, new in enumerate(([100, 1, 37], [1, 1, 1], [1, 60, 1], [70, 1, 1], [1, 1, 1])):
        x = _tokens(sum(new), seed=step)
        starts = np.concatenate(([0], np.cumsum(new)))
        held = past + new
        after = np.stack((held // 32 * 32, np.maximum(held - 32, 0)), axis=1) if seals else sealed
        records = cache.records[0]
        records[:, :, 4] = held[:, None]
        records[:, :, 5:7], records[:, :, 7:9], records[:, :, 14] = sealed[:, None], after[:, None], past[:, None]
        out = runner.run(x, list(starts), list(past))
        read = written = 0
        for row in range(3):
            k, v = cache.read(row, tuple(sealed[row]), held[row])
            newest = x[starts[row] : starts[row + 1]]
            np.testing.assert_array_equal(
                k[:, past[row] :], _expected(forms[0], np.ascontiguousarray(newest[:, _N : _N + _G].swapaxes(0, 1)))
            )
            np.testing.assert_array_equal(
                v[:, past[row] :], _expected(forms[1], np.ascontiguousarray(newest[:, _N + _G :].swapaxes(0, 1)))
            )
            for t in range(new[row]):
                slots, now = np.arange(held[row]), past[row] + t
                seen = (slots <= now) & ((slots > now - window) if window else True)
                expected = _attention(newest[t, :_N], k, v, seen)
                bound = _rtol(*forms) * np.abs(expected).max()
                np.testing.assert_allclose(out[starts[row] + t], expected, rtol=0, atol=bound)
            from_slot = max(0, past[row] + 1 - window) if window else 0
            for field, was, now in ((0, sealed[row, 0], after[row, 0]), (1, sealed[row, 1], after[row, 1])):
                coded = forms[2 + field]
                read += _G * _bytes(cache.columns[field].form, coded, from_slot, held[row], was)
                written += _G * cache.columns[field].form.named.nbytes(new[row], 64)
                if coded is None or was == now:
                    continue
                # What has been sealed is what the landing pages held.
                written += _G * coded.named.nbytes(now - was, 64)
                mine = slice(row * _G, (row + 1) * _G)
                landed, kept = (cache.columns[at].read(was, now - was)[mine] for at in (field, 2 + field))
                np.testing.assert_array_equal(kept, _expected(coded, landed))
        ((_, weights, kv_read, kv_written, flops, _),) = runner.core.metered()
        assert (weights, kv_read, kv_written) == (0, read, written)
        assert flops > 0
        past, sealed = held, after
    assert runner.core.recomputed == 0 or (unified is not None and unified[2] < 1)


def _bytes(landing: Form, coded: Form | None, first: int, last: int, sealed: int) -> int:
    """Bytes of slots [first, last): every token once, groups of tokens whole."""
    border = min(max(sealed, first), last)
    total = landing.named.nbytes(last - border, 64)
    if coded is None or first == border:
        return total
    if coded.step == 1:
        return total + coded.named.nbytes(border - first, 64)
    groups = -(-border // coded.group) - first // coded.group
    return total + (border - first) * -(-64 * coded.bits // 8) + 4 * 64 * groups


@pytest.mark.parametrize("new", [1, 5, 40])
def test_program_ring_and_positions(new: int) -> None:
    """A ring of 4 + 60 that has wrapped; a pass of several tokens lands behind it first."""
    cache = Cache((Form(F32, 64), Form(BF16, 64), None, None), 1, 256)
    runner = Runner(cache, ring=(4, 60), split=16)
    old = _tokens(64, seed=3)
    for column in range(2):
        part = np.ascontiguousarray(old[:, _N + column * _G : _N + (column + 1) * _G].swapaxes(0, 1))
        cache.columns[column].write(0, part)
    past = 300
    ring = np.concatenate((np.arange(4), past - 60 + (np.arange(60) + 17) % 60))
    positions = np.concatenate((ring, past + np.arange(new))).astype(np.int32)
    records = cache.records[0, 0]
    records[:, 4], records[:, 10], records[:, 14] = 64 + new, positions.ctypes.data, 64
    x = _tokens(new)
    out = runner.run(x, [0, new], [past])
    k, v = cache.read(0, (0, 0), 64 + new)
    for t in range(new):
        seen = (positions <= past + t) & ((positions < 4) | (positions > past + t - 60))
        expected = _attention(x[t, :_N], k, v, seen)
        np.testing.assert_allclose(out[t], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_program_reads_chosen_pieces_of_what_is_left() -> None:
    """Heads hold different numbers of tokens, fewer than they have seen, and one reads only some of them."""
    cache = Cache(_KIVI, 1, 256)
    runner = Runner(cache, threads=2, split=32)
    old = _tokens(160, seed=3)
    for column in range(4):
        source = old[:, _N + column % 2 * _G : _N + (column % 2 + 1) * _G]
        cache.columns[column].write(0, np.ascontiguousarray(source.swapaxes(0, 1)))
    chosen = np.array([0, 2, 3, 8], np.int32)
    records = cache.records[0, 0]
    positions = np.arange(0, 322, 2).astype(np.int32)
    records[:, 5], records[:, 6], records[:, 7], records[:, 8] = 96, 100, 96, 100
    records[:, 4], records[:, 14], records[:, 10] = (161, 90), (160, 89), positions.ctypes.data
    records[1, 5:9] = 64
    records[0, 11:14] = chosen.ctypes.data, len(chosen), 16
    x = _tokens(1)
    out = runner.run(x, [0, 1], [500])
    for g, slots, seen in ((0, 161, np.isin(np.arange(161) // 16, chosen)), (1, 90, np.ones(90, bool))):
        k, v = cache.read(0, tuple(records[g, 5:7]), slots)
        expected = _attention(x[0, :_N], k, v, seen)[3 * g : 3 * g + 3]
        bound = _rtol(*_KIVI) * np.abs(expected).max()
        np.testing.assert_allclose(out[0, 3 * g : 3 * g + 3], expected, rtol=0, atol=bound)
    ((_, _, read, _, flops, _),) = runner.core.metered()
    # Pieces 0, 2, 3 are sealed, 48 tokens in groups 0 and 1; piece 8 is the tail. A code of 2 bits, 2 groups of values.
    first = 48 * 16 + 2 * 4 * 64 + 48 * (16 + 8) + 2 * 16 * 256
    second = 64 * 16 + 2 * 4 * 64 + 64 * (16 + 8) + 2 * 26 * 256
    assert read == first + second
    assert flops == 4 * 3 * (64 + 90) * 64


def test_program_seals_thin_keys() -> None:
    thin = Form(TILED_BF16, 39)
    cache = Cache((Form(F32, 64), Form(F32, 64), thin, None), 1, 128)
    runner = Runner(cache)
    channels = np.sort(np.random.default_rng(1).permutation(64)[:39]).astype(np.uint8)
    records = cache.records[0, 0]
    records[:, 4], records[:, 7], records[:, 9] = 100, 71, channels.ctypes.data
    x = _tokens(100)
    runner.run(x, [0, 100], [0])
    kept = np.ascontiguousarray(x[:71, _N : _N + _G, channels].swapaxes(0, 1))
    coded = cache.columns[2].read(0, 71)
    np.testing.assert_array_equal(coded, _expected(thin, kept))
    records[:, 4], records[:, 5], records[:, 14] = 101, 71, 100
    y = _tokens(1, seed=4)
    out = runner.run(y, [0, 1], [100])
    k, v = cache.read(0, (0, 0), 101)
    k[:, :71] = 0
    k[:, :71, channels] = coded
    expected = _attention(y[0, :_N], k, v, np.ones(101, bool))
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert runner.core.metered()[0][2] == _G * (71 * 78 + (30 + 101) * 256)


def test_program_watches_the_newest_queries() -> None:
    cache = Cache(_PLAIN, 2, 128)
    runner = Runner(cache)
    assert runner.core.queries(0).shape == (0, 0, _N, _H)
    runner.core.watch(4)
    x = _tokens(9)
    cache.records[0, :, :, 4] = [[7], [2]]
    runner.run(x, [0, 7, 9], [0, 0])
    found = runner.core.queries(0)
    np.testing.assert_array_equal(found[0], x[3:7, :_N])
    np.testing.assert_array_equal(found[1], np.concatenate((np.zeros((2, _N, _H)), x[7:9, :_N])))
    runner.core.watch(0)


def test_program_reports_what_it_cannot_code() -> None:
    cache = Cache((Form(GRID, 64, 64, 8, 64), Form(F32, 64), None, None), 1, 64)
    runner = Runner(cache)
    cache.records[0, :, :, 4] = 3
    x = _tokens(3)
    runner.run(x, [0, 3], [0])
    x[2, _N, 5] = -1e6
    with pytest.raises(ValueError, match="Keep this cache in floats"):
        runner.run(x, [0, 3], [0])


def test_program_refuses_forms() -> None:
    program = _core.Program(1)
    for forms in (
        [(Form(TILED_GRID, 64, 64, 2, 32).code, Form(F32, 64).code, None, None, 0, 0)] * _G,
        [(Form(F32, 32).code, Form(F32, 64).code, None, None, 0, 0)] * _G,
        [(Form(F32, 64).code, Form(F32, 64).code, None, None, 0, 0)],
    ):
        with pytest.raises(ValueError, match="tiled grid|do not agree|every KV head"):
            program.attend_heads("attend", 0, 0, 0, -1, _N, _G, _H, 0, forms, None, None, 1.0, 0.0, None)
