"""C++ kernels on numpy arrays, and their numpy definition in `reference`.

Each function checks its arguments, allocates its result and calls `_core` with the GIL released. Bytes read are counted
inside the kernel, per row visited. Results do not depend on the number of threads.

Legend: T tokens, K inputs, N outputs, F neurons of a gated FFN, D hidden size, G groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trimtab.errors import HardwareError, MissingDependency, SpecError, unknown
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import GGUF_BLOCKS

try:
    from trimtab.runtime.kernels import _core
except ImportError as error:  # a source tree that was never built
    raise MissingDependency(
        "The C++ kernels of Trimtab are not built here. Build them: pip install . (or: make setup)"
    ) from error

#: Names of the ggml block formats in the order of the enum in `cpp/kernels.h`.
BLOCK_KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")
#: Activations of `gate_first`, in the order of the enum in `cpp/kernels.h`.
ACTS = ("silu", "gelu_tanh", "gelu")


class IntRows(NamedTuple):
    """Rows of an integer matrix as `WeightFormat(kind="int")` stores them; logical shape [rows, G * group].

    Args:
        codes: uint8 [rows, ceil(cols * bits / 8)], packed little-endian along the row.
        scale: float16 or its bits as uint16, [rows, G].
        minimum: as `scale`, or None: ``w = scale * (code - 2**(bits-1))`` instead of ``scale * code + minimum``.
        bits: bits of a code, 2..8.
        group: columns that share a scale; a multiple of 8 is fast, any other works.
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """Logical (rows, columns)."""
        return self.codes.shape[0], self.scale.shape[1] * self.group


#: A stored matrix by rows: float32 [rows, cols], bfloat16 as its bits (uint16 [rows, cols]), or integers.
RowMatrix = np.ndarray | IntRows


class GateFirst(NamedTuple):
    """Result of `gate_first`.

    Args:
        y: float32 [T, D].
        rows_touched: neurons active for at least one token; that many rows of up and of down were read.
        active: int64 [T], active neurons of each token.
        bytes_read: bytes of (gate, up, down) the kernel visited.
    """

    y: np.ndarray
    rows_touched: int
    active: np.ndarray
    bytes_read: tuple[int, int, int]


def int8_product(w: np.ndarray, x: np.ndarray, threads: int = 1) -> np.ndarray:
    """Return x [T, K] @ W [N, K].T, both int8, as int32 [T, N]: exact for K up to 133,000.

    Args:
        w, x: int8, contiguous; codes of x are -127..127.
        threads: workers.

    Raises:
        SpecError: other dtypes, or shapes that do not agree.
    """
    if w.dtype != np.int8 or x.dtype != np.int8 or w.ndim != 2 or x.ndim != 2 or w.shape[1] != x.shape[1]:
        raise SpecError(
            f"int8_product wants int8 [N, K] and [T, K], not {w.dtype}{list(w.shape)} and {x.dtype}{list(x.shape)}."
        )
    out = np.empty((len(x), len(w)), np.int32)
    _core.int8_product(np.ascontiguousarray(w), np.ascontiguousarray(x), threads, out)
    return out


def isa() -> str:
    """Name of the instruction set the kernels run with on this processor."""
    return _core.isa()


def use_isa(name: str) -> None:
    """Run the kernels with another instruction set from now on.

    Args:
        name: ``auto`` (the best this processor has), ``scalar`` (what every processor of its kind has), ``avx2`` or ``avx512``.

    Raises:
        HardwareError: this processor lacks it; the message names the missing flags.
        SpecError: another name.
    """
    allowed = ("auto", "scalar", "avx2", "avx512")
    if name not in allowed:
        raise unknown("instruction set", name, allowed)
    chosen = _core.isas()[-1] if name == "auto" else "baseline" if name == "scalar" else name
    missing = _core.missing_flags(chosen)
    if missing == "?":
        raise HardwareError(f"isa={name}: this build has no {name} kernels. Allowed here: {', '.join(_core.isas())}.")
    if missing:
        here = ", ".join("scalar" if isa == "baseline" else isa for isa in _core.isas())
        raise HardwareError(f"isa={name}: this processor lacks {missing}. Allowed here: auto, {here}.")
    _core.use_isa(chosen)


def dequantize_gguf(kind: str, blocks: np.ndarray, out: np.ndarray, threads: int = 1) -> None:
    """Decode ggml blocks into `out`, bit for bit as ggml does.

    Args:
        kind: one of `BLOCK_KINDS`.
        blocks: uint8 [n], contiguous, whole blocks.
        out: float32 [elements], contiguous; written in place.
        threads: worker threads.

    Raises:
        SpecError: unknown kind, or sizes that do not agree.

    Source: ggml-common.h (layouts), ggml-quants.c (dequantize_row_*).
    """
    if kind not in BLOCK_KINDS:
        raise unknown("ggml block format", kind, BLOCK_KINDS)
    elements, nbytes = GGUF_BLOCKS[kind]
    if blocks.size % nbytes or out.size != blocks.size // nbytes * elements:
        raise SpecError(
            f"{kind}: {blocks.size} bytes for {out.size} elements. A block is {nbytes} bytes and {elements} elements."
        )
    _core.dequantize(
        BLOCK_KINDS.index(kind), _plain(blocks, np.uint8, 1, "blocks"), _plain(out, np.float32, 1, "out"), threads
    )


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes little-endian along each row: uint8 [rows, cols] -> uint8 [rows, ceil(cols * bits / 8)].

    Bits of a code above `bits` are dropped; unused bits of the last byte are zero.

    Raises:
        SpecError: bits outside 1..8, or codes that are no uint8 matrix.
    """
    _check_bits(bits, 1)
    codes = _plain(codes, np.uint8, 2, "codes")
    packed = np.empty((codes.shape[0], (codes.shape[1] * bits + 7) // 8), np.uint8)
    _core.pack(codes, bits, packed)
    return packed


def unpack_codes(packed: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """Undo `pack_codes`: uint8 [rows, ceil(cols * bits / 8)] -> uint8 [rows, cols].

    Raises:
        SpecError: bits outside 1..8, or a row length that is not that of `cols` codes.
    """
    _check_bits(bits, 1)
    packed = _plain(packed, np.uint8, 2, "packed")
    if packed.shape[1] != (cols * bits + 7) // 8:
        raise SpecError(f"{cols} codes of {bits} bits are {(cols * bits + 7) // 8} bytes a row, not {packed.shape[1]}.")
    codes = np.empty((packed.shape[0], cols), np.uint8)
    _core.unpack(packed, bits, codes)
    return codes


def int_gemv(x: np.ndarray, w: IntRows, threads: int = 1) -> tuple[np.ndarray, int]:
    """Return (y, bytes read): y [T, N] = x [T, K] @ W.T for W [N, K] in integer rows, groups along K.

    W is decoded in registers. Meant for few tokens (decode); four tokens share one decoding of a row.

    Raises:
        SpecError: shapes or dtypes that do not agree.
    """
    x = _plain(x, np.float32, 2, "x")
    rows = _rows(w, x.shape[1], "W")
    y = np.empty((x.shape[0], w.shape[0]), np.float32)
    return y, _core.int_gemv(rows, x, threads, y)


def int_gemv_t(x: np.ndarray, w_t: IntRows, threads: int = 1) -> tuple[np.ndarray, int]:
    """Return (y, bytes read): y [T, N] = x [T, K] @ W.T where the buffers hold W.T [K, N], groups along N.

    Raises:
        SpecError: shapes or dtypes that do not agree.
    """
    x = _plain(x, np.float32, 2, "x")
    rows = _rows(w_t, w_t.shape[1], "W.T")
    if w_t.shape[0] != x.shape[1]:
        raise SpecError(f"x has {x.shape[1]} columns, W.T has {w_t.shape[0]} rows.")
    y = np.empty((x.shape[0], w_t.shape[1]), np.float32)
    return y, _core.int_gemv_t(rows, x, threads, y)


def gate_first(
    x: np.ndarray,
    gate: RowMatrix,
    up: RowMatrix,
    down_t: RowMatrix,
    *,
    threshold: float,
    act: str = "silu",
    threads: int = 1,
) -> GateFirst:
    """Gated FFN that reads the rows of up and down only for neurons whose activation is large.

    ``g = act(x @ gate.T)``; a neuron is active for a token if ``|g| > threshold`` (or g is NaN); ``h = g * (x @ up.T)``
    for active pairs, else 0; ``y = h @ down_t``. Rows that no token needs are not read.

    Args:
        x: float32 [T, D].
        gate, up, down_t: [F, D] each; down is stored transposed. Formats may differ.
        threshold: activations at most this large in magnitude are dropped; a negative value keeps all.
        act: ``silu``, ``gelu_tanh`` or ``gelu`` (erf).
        threads: worker threads.

    Raises:
        SpecError: unknown activation, or shapes or dtypes that do not agree.

    Source: CATS, arXiv 2404.08763, section 4.3.
    """
    if act not in ACTS:
        raise unknown("activation", act, ACTS)
    x = _plain(x, np.float32, 2, "x")
    shapes = {name: m.shape for name, m in (("gate", gate), ("up", up), ("down_t", down_t))}
    if len(set(shapes.values())) != 1:
        raise SpecError(f"gate, up and down_t must have one shape [F, D]; got {shapes}.")
    gate_rows, up_rows = _rows(gate, x.shape[1], "gate"), _rows(up, x.shape[1], "up")
    down_rows = _rows(down_t, x.shape[1], "down_t")
    y = np.empty(x.shape, np.float32)
    active = np.empty(x.shape[0], np.int64)
    touched, *nbytes = _core.gate_first(
        gate_rows, up_rows, down_rows, x, threshold, ACTS.index(act), threads, y, active
    )
    return GateFirst(y, touched, active, (nbytes[0], nbytes[1], nbytes[2]))


def row_matrix(packed: Packed) -> _core.Rows:
    """The stored rows of a packed matrix (fp32, bf16 or int) as the kernels take them.

    Raises:
        SpecError: another format.
    """
    if packed.format.kind == "int":
        found = packed.buffers
        rows = IntRows(found["codes"], found["scale"], found.get("minimum"), packed.format.bits, packed.format.group)
        return _int_rows(rows, str(packed.format))
    return _rows(packed.buffers["data"], packed.shape[1], str(packed.format))


def _rows(w: RowMatrix, cols: int, name: str) -> _core.Rows:
    if w.shape[1] != cols:
        raise SpecError(f"x has {cols} columns, {name} has {w.shape[1]}.")
    if isinstance(w, IntRows):
        return _int_rows(w, name)
    if w.dtype == np.float32:
        return _core.f32_rows(_plain(w, np.float32, 2, name))
    if w.dtype == np.uint16:
        return _core.bf16_rows(_plain(w, np.uint16, 2, name))
    raise SpecError(f"{name} is {w.dtype}. Allowed: float32, bfloat16 bits as uint16, or IntRows.")


def _int_rows(w: IntRows, name: str) -> _core.Rows:
    _check_bits(w.bits)
    rows, cols = w.shape
    if w.group < 1 or w.codes.shape != (rows, (cols * w.bits + 7) // 8) or w.scale.shape[0] != rows:
        raise SpecError(
            f"{name}: codes {list(w.codes.shape)} and scale {list(w.scale.shape)} are no matrix of {w.bits}-bit codes "
            f"with groups of {w.group}."
        )
    if w.minimum is not None and w.minimum.shape != w.scale.shape:
        raise SpecError(f"{name}: minimum {list(w.minimum.shape)} and scale {list(w.scale.shape)} differ in shape.")
    codes = _plain(w.codes, np.uint8, 2, f"{name} codes")
    minimum = None if w.minimum is None else _half_bits(w.minimum, f"{name} minimum")
    return _core.int_rows(codes, _half_bits(w.scale, f"{name} scale"), minimum, w.bits, w.group)


def _half_bits(array: np.ndarray, name: str) -> np.ndarray:
    return _plain(array.view(np.uint16) if array.dtype == np.float16 else array, np.uint16, 2, name)


def _plain(array: np.ndarray, dtype: type, ndim: int, name: str) -> np.ndarray:
    """Return the array, which must be what the kernel reads: never copied in silence."""
    if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
        layout = "" if array.flags.c_contiguous else "non-contiguous "
        raise SpecError(
            f"{name} must be a contiguous {np.dtype(dtype)} array of {ndim} dimensions, "
            f"got {layout}{array.dtype}{list(array.shape)}."
        )
    return array


def _check_bits(bits: int, least: int = 2) -> None:
    if not least <= bits <= 8:
        raise SpecError(f"bits={bits} is not possible. Allowed: {least}..8. Try bits={min(max(bits, least), 8)}.")
