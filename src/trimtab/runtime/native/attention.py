"""The attention kernel of the native program alone, on numpy arrays: what its parts yield, and how long it takes.

Legend: T new tokens, S keys, N query heads, G KV heads, H head size, Q queries that share a KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.cache.pages import Page
from trimtab.runtime.cache.rows import RECORD
from trimtab.runtime.kernels import _core
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import PageFormat, page_format
from trimtab.spec.nodes import ONLINE, AttentionSpec, Softmax, Unified

#: Bounds of a head: a multiple of 16 up to this.
_MOST = 512
#: Tokens of a page.
_PAGE = 64


def unified_limits(attn: AttentionSpec) -> tuple[float, float, float] | None:
    """(phi, low, high) of a unified softmax as the kernel takes them; None for the running maximum."""
    return _limits(attn.softmax)


def _limits(softmax: Softmax) -> tuple[float, float, float] | None:
    if not isinstance(softmax, Unified):
        return None
    if not softmax.recompute:
        return softmax.phi, -math.inf, math.inf
    return softmax.phi, softmax.low, softmax.high


@dataclass(frozen=True, slots=True)
class Coded:
    """Keys or values [G, S, H] in pages.

    Args:
        page: kind of page.
        tokens: S.
        data: uint8 [G, pages, bytes of a page].
        table: int64 [G, pages], their addresses.
    """

    page: Page
    tokens: int
    data: np.ndarray
    table: IntArray

    @property
    def nbytes(self) -> int:
        """Bytes the tokens take."""
        return len(self.data) * self.page.nbytes(self.tokens)

    def floats(self) -> np.ndarray:
        """What they stand for: float32 [G, S, H]."""
        found = np.empty((len(self.data), self.tokens, self.page.width), np.float32)
        _core.decode_pages(self.page.code, self.table, 0, self.tokens, found)
        return found


def encode_pages(x_GSH: np.ndarray, format: str | PageFormat = "fp32", page: int = _PAGE) -> Coded:
    """Bring float32 keys or values [G, S, H] into pages.

    Args:
        x_GSH: values.
        format: of the pages, or its name, see `page_format`.
        page: tokens of one.

    Raises:
        SpecError: values that the format cannot hold.
    """
    x = np.ascontiguousarray(x_GSH, np.float32)
    heads, tokens, size = x.shape
    kind = Page(page_format(format) if isinstance(format, str) else format, size, page)
    count = -(-tokens // kind.tokens)
    data = np.zeros((heads, count, -(-int(kind.nbytes(kind.tokens)) // 64) * 64), np.uint8)
    starts = np.arange(heads)[:, None] * count + np.arange(count)
    coded = Coded(kind, tokens, data, data.ctypes.data + starts * data.shape[2])
    if not _core.encode_pages(kind.code, coded.table, 0, x):
        raise SpecError(f"A value is not finite, or beyond what {kind.form} pages can express.")
    return coded


def record_of(k: Coded, v: Coded, head: int, write: int) -> list[int]:
    """What the kernels read of one KV head whose new tokens start at slot `write`, see `Row`."""
    record = [0] * RECORD
    record[0], record[1] = k.table[head].ctypes.data, v.table[head].ctypes.data
    record[4], record[14] = k.tokens, write
    return record


class Partial(NamedTuple):
    """What a range of keys yields for Q queries; ranges know nothing of each other.

    Args:
        sums: float32 [Q, H], sum of weight * value.
        weight: float32 [Q], sum of the weights: ``exp(score - phi)``, or ``exp(score - largest)`` without phi.
        largest: float32 [Q], largest score; -inf if no key of the range is seen.
    """

    sums: np.ndarray
    weight: np.ndarray
    largest: np.ndarray


def attend_range(
    q_QH: np.ndarray,
    k_SH: np.ndarray,
    v_SH: np.ndarray,
    *,
    first: int = 0,
    last: int | None = None,
    low: Sequence[int] | np.ndarray | None = None,
    high: Sequence[int] | np.ndarray | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    phi: float | None = None,
    format: str = "fp32",
    page: int | None = None,
) -> Partial:
    """Run the kernel on the keys [first, last) of one KV head.

    Args:
        q_QH: float32 [Q, H], queries that share the head.
        k_SH, v_SH: float32 [S, H]; they are brought into `format` and into pages of `page` tokens first.
        low, high: [Q], query n sees keys [low[n], high[n]); None = all.
        scale, softcap: on the scores.
        phi: of a unified softmax; None = the largest score of the range.
        format: of the pages.
        page: tokens of a page, each a buffer of its own; None = one page of all.

    Raises:
        SpecError: shapes that do not agree, or a head the kernel does not take.
    """
    s, h = k_SH.shape
    if q_QH.shape[1] != h or v_SH.shape != k_SH.shape or h % 16 or not 16 <= h <= _MOST:
        raise SpecError(
            f"q {list(q_QH.shape)}, k {list(k_SH.shape)}, v {list(v_SH.shape)} do not agree. Allowed: [Q, H], [S, H], [S, H] "
            f"with H a multiple of 16 up to {_MOST}."
        )
    if (page or s) < 1 or not 0 <= first <= (s if last is None else last) <= s:
        raise SpecError(
            f"page={page}, keys {first}..{last} of {s}: not possible. Allowed: page >= 1, 0 <= first <= last <= {s}."
        )
    k, v = (encode_pages(x[None], format, page or s) for x in (k_SH, v_SH))
    q = np.ascontiguousarray(q_QH, np.float32)
    count = len(q)
    out, weight, largest = np.empty((count, h), np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    _core.attend_heads(
        q, np.array(record_of(k, v, 0, s), np.int64), (k.page.code, v.page.code, None, None, 0, 0), first, s if last is None else last,
        np.asarray(np.zeros(count) if low is None else low, np.int64),
        np.asarray(np.full(count, s) if high is None else high, np.int64), None, 0, 0, scale, softcap, phi, out, weight, largest,
    )  # fmt: skip
    return Partial(out, weight, largest)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention over keys and values that lie in the cache already, as a program runs it: cut, joined, guarded.

    Args:
        heads, kv_heads, head_dim: N, G, H.
        scale, softcap: on the scores.
        window: tokens a query sees; 0 = all.
        softmax: how the parts are joined.
        split: keys of a part in decode; 0 = the kernel's choice.
        format: of the pages.
        threads: workers.

    Raises:
        SpecError: a head the kernel does not take, or a split below 1.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float = 1.0
    softcap: float = 0.0
    window: int = 0
    softmax: Softmax = ONLINE
    split: int = 0
    format: str = "fp32"
    threads: int = 1
    _core: _core.Program = field(init=False, repr=False, compare=False)
    _ends: tuple[int, int] = field(init=False, repr=False, compare=False)
    _page: Page = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.head_dim % 16 or not 16 <= self.head_dim <= _MOST or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise SpecError(
                f"{self.heads} heads of {self.head_dim} over {self.kv_heads} KV heads: not possible. Allowed: a multiple of the "
                f"KV heads, of 16..{_MOST} elements in steps of 16."
            )
        if self.split < 0:
            raise SpecError(f"split={self.split} is not possible. Allowed: 1 or more, or 0 for the kernel's choice.")
        program = _core.Program(self.threads)
        qkv = program.values((self.heads + 2 * self.kv_heads) * self.head_dim, False)
        out = program.values(self.heads * self.head_dim, False)
        page = Page(page_format(self.format), self.head_dim, _PAGE)
        program.attend_heads(
            "attend", 0, qkv, out, -1, self.heads, self.kv_heads, self.head_dim, self.window,
            [(page.code, page.code, None, None, 0, 0)] * self.kv_heads, None, None, self.scale, self.softcap, _limits(self.softmax), False,
        )  # fmt: skip
        program.split(self.split)
        object.__setattr__(self, "_core", program)
        object.__setattr__(self, "_ends", (qkv, out))
        object.__setattr__(self, "_page", page)

    @property
    def recomputed(self) -> int:
        """Rows (a token of a head) computed again so far."""
        return self._core.recomputed

    def run(self, q_TNH: np.ndarray, k: Coded, v: Coded) -> np.ndarray:
        """Return float32 [T, N, H] of the last T tokens of the cache."""
        return self.timed(q_TNH, k, v)[0]

    def timed(self, q_TNH: np.ndarray, k: Coded, v: Coded) -> tuple[np.ndarray, float]:
        """As `run`, with the seconds it took.

        Raises:
            SpecError: shapes or formats that do not agree.
        """
        for name, coded in (("k", k), ("v", v)):
            if coded.page != self._page or len(coded.data) != self.kv_heads or coded.tokens != k.tokens:
                raise SpecError(
                    f"{name}: {len(coded.data)} heads of {coded.tokens} tokens of {coded.page.width} in {coded.page.form} pages of "
                    f"{coded.page.tokens}; the kernel reads {self.kv_heads} heads of {k.tokens} tokens of {self.head_dim} in "
                    f"{self._page.form} pages of {self._page.tokens}."
                )
        if q_TNH.shape[1:] != (self.heads, self.head_dim) or not 1 <= len(q_TNH) <= k.tokens:
            raise SpecError(f"q {list(q_TNH.shape)} is no [T, {self.heads}, {self.head_dim}] with T in 1..{k.tokens}.")
        tokens = len(q_TNH)
        x = np.zeros((tokens, self.heads + 2 * self.kv_heads, self.head_dim), np.float32)
        x[:, : self.heads] = q_TNH
        out = np.empty((tokens, self.heads * self.head_dim), np.float32)
        past = k.tokens - tokens
        records = np.array([[[record_of(k, v, head, past) for head in range(self.kv_heads)]]], np.int64)
        seconds = self._core.run_on(
            np.array([0, tokens]), np.array([past]), records, self._ends[0], x.reshape(tokens, -1), self._ends[1], out
        )
        return out.reshape(tokens, self.heads, self.head_dim), seconds
