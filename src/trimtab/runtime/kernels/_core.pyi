"""The compiled module; see `cpp/bindings.cpp`. Arguments are checked by the functions of the package."""

from collections.abc import Sequence

import numpy as np

class Rows: ...

def f32_rows(data: np.ndarray) -> Rows: ...
def bf16_rows(data: np.ndarray) -> Rows: ...
def int_rows(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None, bits: int, group: int) -> Rows: ...
def dequantize(kind: int, blocks: np.ndarray, out: np.ndarray, threads: int) -> None: ...
def pack(codes: np.ndarray, bits: int, out: np.ndarray) -> None: ...
def unpack(packed: np.ndarray, bits: int, out: np.ndarray) -> None: ...
def int_gemv(w: Rows, x: np.ndarray, threads: int, y: np.ndarray) -> int: ...
def int_gemv_t(w_t: Rows, x: np.ndarray, threads: int, y: np.ndarray) -> int: ...
def gate_first(
    gate: Rows,
    up: Rows,
    down_t: Rows,
    x: np.ndarray,
    threshold: float,
    act: int,
    threads: int,
    y: np.ndarray,
    active: np.ndarray,
) -> tuple[int, int, int, int]: ...

#: Way to multiply, mantissa bits of operands, whether they are rounded to nearest, offset, fields of the smallest and the largest
#: number, what sums are rounded to, its mantissa bits; see `cpp/lmul.h`.
AddRule = tuple[int, int, bool, int, int, int, int, int]

def lmul(rule: AddRule, a: np.ndarray, b: np.ndarray, threads: int, y: np.ndarray) -> None: ...
def lmul_matmul(rule: AddRule, x: np.ndarray, w: np.ndarray, transposed: bool, threads: int, y: np.ndarray) -> None: ...
def lmul_round(rule: AddRule, x: np.ndarray, y: np.ndarray) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str) -> bool: ...
def missing_flags(name: str) -> str: ...

class Tiles:
    @property
    def tile_bytes(self) -> int: ...

class Norm: ...

def tiles(
    coding: int,
    scales: int,
    bits: int,
    rows: int,
    cols: int,
    group: int,
    data: np.ndarray,
    scale: np.ndarray | None,
    minimum: np.ndarray | None,
    sub: np.ndarray | None,
    entry: int = 0,
    table_group: int = 0,
    fast_average: bool = False,
    bipolar: bool = False,
    values: np.ndarray | None = None,
    choice: np.ndarray | None = None,
) -> Tiles: ...
def pack_tiles(codes: np.ndarray, bits: int, out: np.ndarray) -> None: ...
def unpack_tiles(packed: np.ndarray, bits: int, out: np.ndarray) -> None: ...
def pack_planes(codes: np.ndarray, bits: int, lanes: bool, out: np.ndarray) -> None: ...
def unpack_planes(packed: np.ndarray, bits: int, lanes: bool, out: np.ndarray) -> None: ...
def pack_ternary(weights: np.ndarray, group: int, out: np.ndarray) -> None: ...
def unpack_ternary(packed: np.ndarray, group: int, out: np.ndarray) -> None: ...
def multiply(
    w: Tiles, x: np.ndarray, threads: int, y: np.ndarray, twice_from: float = ..., flat: int = 1, decoded: int = ...
) -> int: ...
def time_products(
    w: list[Tiles], x: np.ndarray, threads: int, flows: list[tuple[int, int]], repeats: int
) -> list[list[float]]: ...

#: Signs and scales in tiles, flat; rows, columns, rows and columns that share scales, bits, terms of a scale.
Binary = tuple[np.ndarray, np.ndarray, int, int, int, int, int, int]
#: Matrix, index of the values it writes, first column there, bias, factor, cap.
#: Left factor [a, a], transposed right factor [b, b], order of the columns int32 [a * b].
Rotation = tuple[np.ndarray, np.ndarray, np.ndarray]
BinaryProduct = tuple[Binary, int, int, np.ndarray | None, float, float]

def exp_sum(x: np.ndarray, top: float, by: float) -> float: ...
def binary_multiply(w: Binary, x: np.ndarray, threads: int, y: np.ndarray) -> None: ...
def binary_multiply_plain(w: Binary, x: np.ndarray, y: np.ndarray) -> None: ...
def binary_fit(
    w: np.ndarray,
    cost: np.ndarray | None,
    bits: int,
    apot: int,
    rounds: int,
    nearest: bool,
    even: tuple[float, ...],
    threads: int,
    scales: np.ndarray,
) -> None: ...
def int8_product(w: np.ndarray, x: np.ndarray, threads: int, out: np.ndarray) -> None: ...

#: Rows int8 [N, K], what a unit of each stands for, and fp16 columns [columns, N] as their bits.
Int8Rows = tuple[np.ndarray, np.ndarray, np.ndarray | None]
#: Matrix, index of the values it writes, first column there, bias, factor, cap.
Int8Product = tuple[Int8Rows, int, int, np.ndarray | None, float, float]

#: Kind (see `cpp/native/pages.h`), tokens of a page, elements of a token, bits of a code, elements that share a scale,
#: bytes from one token of floats to the next (0: side by side).
PageForm = tuple[int, int, int, int, int, int]

def encode_pages(form: PageForm, table: np.ndarray, first: int, x: np.ndarray) -> bool: ...
def decode_pages(form: PageForm, table: np.ndarray, first: int, count: int, out: np.ndarray) -> None: ...

#: Of a KV head: keys and values as they land, sealed ones, sink and recent of a ring (recent 0: none).
HeadForms = tuple[PageForm, PageForm, PageForm | None, PageForm | None, int, int]

def attend_heads(
    q: np.ndarray,
    record: np.ndarray,
    forms: HeadForms,
    first: int,
    last: int,
    low: np.ndarray,
    high: np.ndarray,
    positions: np.ndarray | None,
    window: int,
    sink: int,
    scale: float,
    softcap: float,
    phi: float | None,
    out: np.ndarray,
    weight: np.ndarray,
    largest: np.ndarray,
    turned: bool = False,
) -> None: ...
def move_pages(form: PageForm, source: np.ndarray, target: np.ndarray, slots: np.ndarray, first: int) -> None: ...

#: Matrix, index of the values it writes, first column there, bias, factor, cap, tokens from which the flat and the decoding
#: kernel multiply.
Product = tuple[Tiles, int, int, np.ndarray | None, float, float, int, int]

class Program:
    def __init__(self, threads: int) -> None: ...
    def values(self, width: int, logits: bool) -> int: ...
    def norm(self, layer: bool, eps: float, size: int, weight: np.ndarray | None, bias: np.ndarray | None) -> Norm: ...
    def rope(self, inverse: list[float], longer: list[float], original: int, scale: float) -> int: ...
    def embed(self, name: str, table: Tiles, scale: float, values: int) -> None: ...
    def positions(self, name: str, table: Tiles, offset: int, values: int) -> None: ...
    def linear(
        self, name: str, source: int, norm: Norm | None, products: list[Product], store: int, act: int
    ) -> None: ...
    def int8_linear(
        self,
        name: str,
        source: int,
        norm: Norm | None,
        products: list[Int8Product],
        threshold: float,
        columns: list[int] | None,
        store: int,
        act: int,
    ) -> None: ...
    def binary_linear(
        self,
        name: str,
        source: int,
        norm: Norm | None,
        rotation: Rotation | None,
        products: list[BinaryProduct],
        store: int,
        act: int,
    ) -> None: ...
    def gate_first(
        self,
        name: str,
        source: int,
        values: int,
        norm: Norm,
        gate: Tiles,
        up: Rows,
        down_t: Rows,
        act: int,
        threshold: float,
        max_tokens: int,
        prefill: bool,
    ) -> None: ...
    def norm_add(self, name: str, source: int, norm: Norm, values: int) -> None: ...
    def attend_heads(
        self,
        name: str,
        layer: int,
        qkv: int,
        out: int,
        rope: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        forms: Sequence[HeadForms],
        q_norm: Norm | None,
        k_norm: Norm | None,
        scale: float,
        softcap: float,
        unified: tuple[float, float, float] | None,
        append: bool = True,
        prompt: tuple[int, int] = (0, 0),
    ) -> None: ...
    def watch(self, count: int) -> None: ...
    def queries(self, layer: int) -> np.ndarray: ...
    def split(self, keys: int) -> None: ...
    def run_on(
        self,
        starts: np.ndarray,
        past: np.ndarray,
        records: np.ndarray,
        source: int,
        x: np.ndarray,
        out: int,
        y: np.ndarray,
    ) -> float: ...
    def run(
        self,
        ids: np.ndarray,
        starts: np.ndarray,
        past: np.ndarray,
        reach: np.ndarray,
        logits_rows: np.ndarray,
        records: np.ndarray,
        values: int,
        timed: bool,
        out: np.ndarray,
        whole: np.ndarray | None = None,
        first: int = 0,
        end: int = -1,
    ) -> None: ...
    @property
    def attends(self) -> list[int]: ...
    def metered(self) -> list[tuple[str, int, int, int, int, float]]: ...
    def observed(self) -> list[tuple[str, int, int]]: ...
    def outliers(self) -> list[tuple[str, int]]: ...
    @property
    def recomputed(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...

# Planes of bits, see `cpp/popcount.h`.
def pack_bits(codes: np.ndarray, bits: int, group: int, out: np.ndarray) -> None: ...
def unpack_bits(planes: np.ndarray, bits: int, group: int, out: np.ndarray) -> None: ...
def code_bits(x: np.ndarray, bits: int, clipped: float, codes: np.ndarray, scale: np.ndarray) -> None: ...
def bit_integers(
    planes: np.ndarray, bits: int, x: np.ndarray, act_bits: int, cols: int, bytes: bool, threads: int, out: np.ndarray
) -> int: ...
def bit_multiply(
    planes: np.ndarray,
    scale: np.ndarray | None,
    bits: int,
    cols: int,
    group: int,
    x: np.ndarray,
    act_bits: int,
    clipped: float,
    bytes: bool,
    fused: bool,
    threads: int,
    y: np.ndarray,
) -> tuple[int, int]: ...

class SlotMemory:
    slot_bytes: int
    used_groups: int
    def __init__(
        self,
        token_bytes: list[int],
        slots: int,
        tokens: int,
        page: int,
        pool_groups: int,
        background: bool = False,
        eager_steps: int = 10,
        eager_groups: int = 2,
        deferred: bool = True,
        whole: bool = False,
        secure: bool = False,
    ) -> None: ...
    def open(self) -> int: ...
    def fork(self, seq: int, tokens: int) -> int: ...
    def close(self, seq: int) -> None: ...
    def cut(self, seq: int, tokens: int) -> None: ...
    def step(self, seqs: np.ndarray, first: np.ndarray, end: np.ndarray, found: np.ndarray) -> None: ...
    def settle(self) -> None: ...
    def address(self, tensor: int) -> int: ...
    def counts(self) -> dict[str, int]: ...
