"""The attention kernel of the native program alone, on numpy arrays: what its parts yield, and how long it takes.

Legend: T new tokens, S keys, N query heads, G KV heads, H head size, Q queries that share a KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trimtab.errors import SpecError, unknown
from trimtab.runtime.kernels import _core
from trimtab.runtime.numerics import bfloat16_bits, bfloat16_to_float32
from trimtab.spec.cache import PAGE_GROUP, PageFormat, page_format
from trimtab.spec.nodes import ONLINE, AttentionSpec, Softmax, Unified

#: Page formats the kernel reads -> index in `Coding` of ``cpp/native/tiles.h``.
CODINGS = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
#: Bounds of a head: a multiple of 16 up to this.
_MOST = 512


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
    """Keys or values [G, S, H] in a page format, in one run as the kernel reads it.

    Args:
        format: fp32, fp16, bf16 or int8.
        shape: (G, S, H).
        data: uint8, one run: the elements, or the codes [G, S, H], then the scales and the minima [G, S, ceil(H / group)].
    """

    format: PageFormat
    shape: tuple[int, int, int]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return self.data.nbytes

    def floats(self) -> np.ndarray:
        """What it stands for: float32 [G, S, H]."""
        if self.format.kind == "int8":
            codes, scale, minimum = self.parts()
            wide = [
                np.repeat(part.astype(np.float32), self.format.group, axis=-1)[..., : self.shape[2]]
                for part in (scale, minimum)
            ]
            return codes * wide[0] + wide[1]
        if self.format.kind == "bf16":
            return bfloat16_to_float32(self.data.view(np.uint16).reshape(self.shape))
        return (
            self.data.view({"fp32": np.float32, "fp16": np.float16}[self.format.kind])
            .reshape(self.shape)
            .astype(np.float32)
        )

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes [G, S, H], scales and minima [G, S, ceil(H / group)] of integer pages, as views."""
        return grid_parts(self.data, self.shape, self.format.group)


def grid_parts(run: np.ndarray, shape: tuple[int, int, int], group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of one uint8 run of integer pages: codes [G, S, H], fp16 scales and fp16 minima [G, S, ceil(H / group)]."""
    heads, tokens, size = shape
    codes, groups = heads * tokens * size, -(-size // group)
    ends = codes, codes + 2 * heads * tokens * groups
    scale, minimum = (
        part.view(np.float16).reshape(heads, tokens, groups) for part in (run[ends[0] : ends[1]], run[ends[1] :])
    )
    return run[:codes].reshape(shape), scale, minimum


def code_rows(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round the rows of float32 x [..., H] to integer pages: uint8 codes [..., H], fp16 scales and minima [..., ceil(H / group)].

    A group spans its own least and largest element in 255 steps.
    """
    rows = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
    groups = -(-rows.shape[1] // group)
    codes = np.empty(rows.shape, np.uint8)
    scale, minimum = (np.empty((len(rows), groups), np.uint16) for _ in range(2))
    _core.encode_grid(rows, group, codes, scale, minimum)
    lead = x.shape[:-1]
    scales, minima = (part.view(np.float16).reshape(*lead, groups) for part in (scale, minimum))
    return codes.reshape(x.shape), scales, minima


def encode_pages(x_GSH: np.ndarray, format: str = "fp32") -> Coded:
    """Bring float32 keys or values [G, S, H] into a page format.

    Args:
        x_GSH: values.
        format: ``float32 | bfloat16 | float16 | int8``, see `page_format`.

    Raises:
        SpecError: a format the kernel does not read.
    """
    made = page_format(format)
    if made.kind not in CODINGS:
        raise unknown("page format of the native attention", format, ("float32", "bfloat16", "float16", "int8"))
    x = np.ascontiguousarray(x_GSH, np.float32)
    g, s, h = x.shape
    if made.kind == "int8":
        data = np.concatenate([part.reshape(-1).view(np.uint8) for part in code_rows(x, made.group)])
    elif made.kind == "bf16":
        data = bfloat16_bits(x).reshape(-1).view(np.uint8)
    else:
        data = x.astype({"fp32": np.float32, "fp16": np.float16}[made.kind]).reshape(-1).view(np.uint8)
    return Coded(made, (g, s, h), data)


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
    size = page or s
    if size < 1 or not 0 <= first <= (s if last is None else last) <= s:
        raise SpecError(
            f"page={page}, keys {first}..{last} of {s}: not possible. Allowed: page >= 1, 0 <= first <= last <= {s}."
        )
    pages: list[list[np.ndarray]] = [[], []]
    grids = []
    form = page_format(format)
    for start in range(0, s, size):
        parts = [encode_pages(x[None, start : start + size], format) for x in (k_SH, v_SH)]
        for held, part in zip(pages, parts, strict=True):
            held.append(part.data)
        if form.kind == "int8":
            (_, k_scale, k_min), (_, v_scale, v_min) = (part.parts() for part in parts)
            grids.append(
                tuple(np.ascontiguousarray(x).reshape(-1).view(np.uint16) for x in (k_scale, k_min, v_scale, v_min))
            )
    q = np.ascontiguousarray(q_QH, np.float32)
    count = len(q)
    out, weight, largest = np.empty((count, h), np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    _core.attend_pages(
        CODINGS[form.kind], q, pages[0], pages[1], grids, size, form.group or PAGE_GROUP, first, s if last is None else last,
        np.asarray(np.zeros(count) if low is None else low, np.int64),
        np.asarray(np.full(count, s) if high is None else high, np.int64), scale, softcap, phi, out, weight, largest,
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
        form = page_format(self.format)
        program.attend(
            "attend", 0, qkv, out, -1, self.heads, self.kv_heads, self.head_dim, self.window, CODINGS[form.kind], None, None,
            self.scale, self.softcap, _limits(self.softmax), form.group, False,
        )  # fmt: skip
        program.split(self.split)
        object.__setattr__(self, "_core", program)
        object.__setattr__(self, "_ends", (qkv, out))

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
        form = page_format(self.format)
        wanted = (self.kv_heads, k.shape[1], self.head_dim)
        if k.shape != wanted or v.shape != wanted or k.format != form or v.format != form:
            raise SpecError(f"k {k.format}{list(k.shape)} and v {v.format}{list(v.shape)} are no {form}{list(wanted)}.")
        if q_TNH.shape[1:] != (self.heads, self.head_dim) or not 1 <= len(q_TNH) <= k.shape[1]:
            raise SpecError(
                f"q {list(q_TNH.shape)} is no [T, {self.heads}, {self.head_dim}] with T in 1..{k.shape[1]}."
            )
        tokens = len(q_TNH)
        x = np.zeros((tokens, self.heads + 2 * self.kv_heads, self.head_dim), np.float32)
        x[:, : self.heads] = q_TNH
        out = np.empty((tokens, self.heads * self.head_dim), np.float32)
        cache = np.array([[[k.data.ctypes.data, v.data.ctypes.data, k.shape[1]]]], np.int64)
        seconds = self._core.run_on(
            np.array([0, tokens]),
            np.array([k.shape[1] - tokens]),
            cache,
            self._ends[0],
            x.reshape(tokens, -1),
            self._ends[1],
            out,
        )
        return out.reshape(tokens, self.heads, self.head_dim), seconds
