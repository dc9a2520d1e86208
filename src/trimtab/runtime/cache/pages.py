"""How keys and values lie in pages: access to them, and the codec of every page format on numpy arrays.

`decode(encode(x))` is what a page stands for, and the oracle of every kernel that writes or reads one; how the bytes lie is told in
`kernels/cpp/native/pages.h`.

Legend: G heads, T tokens, H head size, W elements of a token that are stored, M pages, n elements that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.cache.arena import Arena
from trimtab.runtime.kernels import _core, pack_codes, unpack_codes
from trimtab.runtime.numerics import bfloat16_bits, bfloat16_to_float32
from trimtab.runtime.numerics.bfp import BlockFloat, decode_bfp, encode_bfp, pack_bfp, unpack_bfp
from trimtab.runtime.numerics.scaled import E4M3_VALUES, encode_e4m3
from trimtab.runtime.step import IntArray
from trimtab.runtime.weights.packed import NUMPY_DTYPES
from trimtab.spec.cache import PageFormat

#: Encoded tokens: one array [G, T, ...] of a float format; codes, then what they are scaled by, of another.
Parts = tuple[np.ndarray, ...]
_TOO_LARGE = "A key or value is not finite, or beyond what an fp16 scale can express. Keep this cache in floats."


#: A kind of page as the kernels take it: kind, tokens, width, bits, group and stride.
Code = tuple[int, int, int, int, int, int]
#: Page formats -> index in `PageKind` of ``cpp/native/pages.h``, for tokens side by side and for channels side by side.
_ROWS = {"fp32": 0, "fp16": 1, "bf16": 2, "fp8": 3, "int8": 4, "int4": 4, "int2": 4, "bfp": 5}
_TURNED = {"fp32": 6, "fp16": 7, "bf16": 8}
_GROUPED = 9
#: Tokens of a tile of pages whose channels lie side by side.
_TILE = 16


@dataclass(frozen=True, slots=True)
class Page:
    """One kind of page.

    Args:
        form: how a token is coded.
        width: elements of a token.
        tokens: of a page.
        turned: floats lie channel after channel, which a kernel that reads few of them wants.
        stride: bytes from one token to the next, where other heads lie between them; 0 = side by side.

    Attributes:
        code: the kind as the kernels take it.
        plain: numpy can read and write its floats.
    """

    form: PageFormat
    width: int
    tokens: int
    turned: bool = False
    stride: int = 0

    @property
    def code(self) -> Code:
        """As the kernels take it."""
        kind = _GROUPED if self.form.by_channel else _ROWS[self.form.kind] if self.plain else self._coded
        return kind, self.tokens, self.width, self.form.bits, self.form.group, self.stride

    @property
    def plain(self) -> bool:
        """Whether it holds the floats of one token after another."""
        return self.form.is_float and not (self.turned and self.tokens % _TILE == 0)

    @property
    def _coded(self) -> int:
        return _TURNED[self.form.kind] if self.form.is_float else _ROWS[self.form.kind]

    def nbytes(self, tokens: Any) -> Any:
        """Bytes of so many tokens of one head."""
        return self.form.nbytes(tokens, self.width)

    def floats(self, arena: Arena) -> np.ndarray:
        """All pages of an arena as the floats they hold [pages, tokens, W]; bf16 as uint16."""
        dtype = NUMPY_DTYPES[self.form.kind]
        used = arena.data[:, : self.tokens * self.width * dtype.itemsize]
        return used.view(dtype).reshape(len(used), self.tokens, self.width)


def read_pages(page: Page, arena: Arena, table: IntArray, addresses: IntArray, first: int, end: int) -> np.ndarray:
    """Tokens [first, end) of G heads, [G, n, W]: their own floats where the page is plain, else what the codes stand for, float32.

    Args:
        table, addresses: [G, M], index and address of each page.
    """
    count = end - first
    if not page.plain:
        found = np.empty((len(table), count, page.width), np.float32)
        if count:
            _core.decode_pages(page.code, addresses, first, count, found)
        return found
    floats = page.floats(arena)
    if count == 0:
        return np.empty((len(table), 0, page.width), floats.dtype)
    low, high = first // page.tokens, -(-end // page.tokens)
    part = table[:, low:high]
    inside = slice(first - low * page.tokens, end - low * page.tokens)
    if floats[0].nbytes == arena.page_bytes and bool((np.diff(part, axis=1) == 1).all()):
        starts = part[:, 0]
        apart = int(starts[1] - starts[0]) if len(starts) > 1 else 0
        if bool((np.diff(starts) == apart).all()) and apart >= 0:  # one stretch of memory: nothing need be moved
            item = floats.itemsize
            return np.lib.stride_tricks.as_strided(
                floats[starts[0]].reshape(page.tokens, page.width),
                (len(part), (high - low) * page.tokens, page.width),
                (apart * arena.page_bytes, page.width * item, item),
            )[:, inside]
    return floats[part].reshape(len(part), -1, page.width)[:, inside]


def write_pages(page: Page, arena: Arena, table: IntArray, addresses: IntArray, first: int, values: np.ndarray) -> None:
    """Write tokens [G, s, W] from slot `first` on.

    Raises:
        SpecError: a value that the format cannot hold.
    """
    if page.plain:
        slots = np.arange(first, first + values.shape[1])
        page.floats(arena)[table[:, slots // page.tokens], slots % page.tokens] = _converted(values, page.form.kind)
    elif not _core.encode_pages(page.code, addresses, first, np.ascontiguousarray(widen(values))):
        raise SpecError(_TOO_LARGE)


def bounds_of(k_GTH: np.ndarray, piece: int) -> np.ndarray:
    """Bf16 bits of the least and the largest of each channel, in pieces of so many tokens: uint16 [G, ceil(T / piece), 2, H].

    Rounded outwards, so that they bound.
    """
    heads, tokens, size = k_GTH.shape
    pieces = -(-tokens // piece)
    full = np.pad(k_GTH, ((0, 0), (0, pieces * piece - tokens), (0, 0)), mode="edge").reshape(
        heads, pieces, piece, size
    )
    least, most = (np.ascontiguousarray(x, np.float32).view(np.uint32) for x in (full.min(axis=2), full.max(axis=2)))
    up, down = (np.uint32(0xFFFF) * (bits >> 31 ^ flip) for bits, flip in ((most, 1), (least, 0)))
    bounds = np.stack(((least + down) >> 16, (most + up) >> 16), axis=2)
    return bounds.astype(np.uint16)


def encode(form: PageFormat, x_GTH: np.ndarray) -> Parts:
    """Code keys or values.

    Args:
        form: page format; one by channel takes whole groups of tokens.
        x_GTH: float32, float16, or bf16 as uint16.

    Raises:
        SpecError: a value that the format cannot hold, or tokens that are no whole groups.
    """
    if form.is_float:
        return (_converted(x_GTH, form.kind),)
    x = np.ascontiguousarray(widen(x_GTH))
    if form.kind == "fp8":
        return (encode_e4m3(x),)
    if form.kind == "bfp":
        codes, fields = encode_bfp(x, _block_float(form))
        return pack_bfp(codes, form.bits), fields
    heads, tokens, size = x.shape
    if form.by_channel:
        if tokens % form.group:
            raise SpecError(f"{form} pages take whole groups of {form.group} tokens, not {tokens}.")
        grouped = x.reshape(heads, tokens // form.group, form.group, size).swapaxes(2, 3)
        codes, scale, minimum = _steps(grouped, form.bits)
        codes = codes.swapaxes(2, 3).reshape(x.shape)
    else:
        groups = -(-size // form.group)
        # The last group may be shorter: filled up with its own last element, it spans what it did.
        full = np.pad(x, ((0, 0), (0, 0), (0, groups * form.group - size)), mode="edge")
        codes, scale, minimum = _steps(full.reshape(heads, tokens, groups, form.group), form.bits)
        codes = codes.reshape(heads, tokens, groups * form.group)[..., :size]
    packed = codes if form.bits == 8 else _packed(codes, form.bits)
    return np.ascontiguousarray(packed), scale, minimum


def decode(form: PageFormat, parts: Parts, size: int) -> np.ndarray:
    """What coded tokens stand for, float32 [G, T, H]; a float format is returned as it is stored."""
    if form.is_float:
        return parts[0]
    if form.kind == "fp8":
        return E4M3_VALUES[parts[0]]
    if form.kind == "bfp":
        return decode_bfp(unpack_bfp(parts[0], form.bits, size), parts[1], _block_float(form))
    codes, scale, minimum = parts
    heads, tokens = codes.shape[:2]
    rows = np.ascontiguousarray(codes).reshape(heads * tokens, codes.shape[2])
    whole = rows if form.bits == 8 else unpack_codes(rows, form.bits, size)
    points = whole.reshape(heads, tokens, size).astype(np.float32)
    along = 1 if form.by_channel else 2
    for part, into in ((scale, np.multiply), (minimum, np.add)):
        wide = np.repeat(part.astype(np.float32), form.group, axis=along)
        into(points, wide[:, :tokens, :size], out=points)
    return points


def _steps(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of groups [..., n] in 2^bits steps from their least to their largest element; scales and minima in fp16 [...].

    Codes are chosen for scale and minimum as rounded to fp16. A group of equal elements has scale 0 and codes 0.

    Source: Liu et al., KIVI, arXiv 2402.02750, section 3.
    """
    top = np.float32(2**bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = x.min(axis=-1).astype(np.float16)
        base = minimum.astype(np.float32)
        scale = ((x.max(axis=-1) - base) / top).clip(0).astype(np.float16)
    if not (np.isfinite(scale).all() and np.isfinite(minimum).all()):
        raise SpecError(_TOO_LARGE)
    step = scale.astype(np.float32)[..., None]
    codes = np.divide(x - base[..., None], step, out=np.zeros_like(x), where=step > 0)
    return np.rint(codes).clip(0, top).astype(np.uint8), scale, minimum


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    heads, tokens, size = codes.shape
    return pack_codes(np.ascontiguousarray(codes).reshape(-1, size), bits).reshape(heads, tokens, -(-size * bits // 8))


def _block_float(form: PageFormat) -> BlockFloat:
    return BlockFloat(bits=form.bits, block=form.group)


def widen(values: np.ndarray) -> np.ndarray:
    """Floats of any width, bf16 as uint16, as float32."""
    return bfloat16_to_float32(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)


def _converted(values: np.ndarray, kind: str) -> np.ndarray:
    """Bring keys or values to a floating dtype; uint16 is bf16."""
    if values.dtype == NUMPY_DTYPES[kind]:
        return values
    wide = widen(values)
    return bfloat16_bits(wide) if kind == "bf16" else wide.astype(NUMPY_DTYPES[kind])
