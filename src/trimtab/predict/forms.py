"""Seconds of one kernel from its sizes: the forms whose constants are fitted to recorded kernels.

A form knows how kernels are built, a handful of constants how fast they run on one device under one software stack:

- Work is cut into tiles, tiles run in waves over the device's units, a wave takes as long as its longest tile.
- A kernel picks the cheapest of a few tile shapes and splits: the least of functions that grow still grows.
- Arithmetic and memory traffic overlap: with sharpness 1 they add up, with a large one the longer of the two counts.
- Bytes that stay in the last-level cache between two runs are read faster.

Every form grows (or stays) with each of its sizes, whatever its constants. All arguments may be arrays that broadcast; ``c``
maps names of constants to numbers (`FORMS` lists them; those in ``_s`` are seconds, shares lie in 0..1). Nothing here knows a
model or a machine. The constants of a device lie in ``data/kernels`` and come from `trimtab.measure.recorded.fit_stack`.

Sources: roofline, Williams et al., CACM 2009, and Yuan et al., arXiv 2402.16363; ring costs, Thakur et al., IJHPCA 2005.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Constants = Mapping[str, float]

#: (rows, columns) of the output tiles a matrix product chooses from, and the parts it may cut k into.
GEMM_TILES = ((16, 64), (64, 64), (128, 128), (128, 256))
GEMM_SPLITS = (1, 2, 4, 8, 16)
#: The same for products grouped by expert, which do not split k.
MOE_TILES = ((16, 64), (64, 64), (64, 128), (128, 128))
#: Query rows of one attention tile, and the parts a decode kernel may cut the keys of a sequence into.
QUERY_TILE = 64
KEY_SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
#: k and keys are worked through in steps of this many.
STEP = 64
#: A window of keys starts and ends anywhere, so up to this many keys around it are worked on and masked.
KEY_TILE = 128


@dataclass(frozen=True, slots=True)
class Device:
    """What a form needs to know of the hardware.

    Args:
        peak_flops_per_s: dense peak of the dtype the products run in.
        bandwidth_bytes_per_s: of the memory.
        llc_bytes: last-level cache; 0 = none.
        units: streaming multiprocessors or cores over which tiles spread.
    """

    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    llc_bytes: float = 0.0
    units: int = 1


def roofline_s(flops: Any, nbytes: Any, device: Device, c: Constants) -> Any:
    """Seconds of any kernel: the longer of its arithmetic and its traffic, and the launch."""
    compute = np.divide(flops, device.peak_flops_per_s * c["compute_efficiency"])
    memory = np.divide(nbytes, device.bandwidth_bytes_per_s * c["bandwidth_efficiency"])
    return np.maximum(compute, memory) + c["launch_s"]


def gemm_s(
    m: Any,
    n: Any,
    k: Any,
    weight_bytes: Any,
    io_bytes: Any,
    device: Device,
    c: Constants,
    working_set_bytes: Any = None,
) -> Any:
    """Seconds of C[m, n] = A[m, k] B[k, n].

    Args:
        m, n, k: rows of the input, columns of the output, length of the sums.
        weight_bytes: of B as stored, scales included.
        io_bytes: of A and C.
        device: peak of the dtype multiplied in.
        c: constants of the class. ``step_s`` and ``edge_s``: latency of one k in a tile, and of one of its rows or columns;
            ``wave_s``: of a wave; ``split_s``: of one more part of k; ``input_bytes`` and ``output_bytes``: traffic of passes
            before and after the product, per element of A and of C (quantizing A, scaling C).
        working_set_bytes: what passes through the cache between two runs of this kernel; None = its own bytes, as in a
            benchmark that repeats it.
    """
    m, n, k = (np.asarray(size, np.float64) for size in (m, n, k))
    rows, columns = (_leading(side, 2, m, n, k) for side in zip(*GEMM_TILES, strict=True))
    splits = _leading(GEMM_SPLITS, 1, m, n, k)
    tiles = np.ceil(m / rows) * np.ceil(n / columns)
    depth = np.ceil(k / (splits * STEP)) * STEP
    waves = np.ceil(tiles * splits / device.units)
    compute = waves * (depth * _tile_step_s(rows, columns, device, c) + c["wave_s"]) + (splits - 1) * c["split_s"]
    nbytes = np.add(weight_bytes, io_bytes)
    memory = nbytes * _uncached(nbytes if working_set_bytes is None else working_set_bytes, device, c)
    memory = memory / (device.bandwidth_bytes_per_s * c["bandwidth_efficiency"])
    passes = (c["input_bytes"] * m * k + c["output_bytes"] * m * n) / device.bandwidth_bytes_per_s
    return c["launch_s"] + passes + _overlap(compute.min((0, 1)), memory, c["sharpness"])


def prefill_attention_s(
    batch: Any,
    new: Any,
    past: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    window: Any,
    kv_item_bytes: Any,
    device: Device,
    c: Constants,
) -> Any:
    """Seconds of causal attention of `new` tokens per sequence over themselves and `past` cached ones.

    Args:
        batch: sequences.
        new, past: tokens of each sequence that bring queries, and cached tokens before them.
        heads, kv_heads, head_dim: query heads, heads of the cache, their width.
        window: keys a query sees at most; inf = all.
        kv_item_bytes: of one element of the cache, scales included.
        device: peak of the 16-bit products.
        c: constants of the class. ``tile_s`` and ``key_s``: latency of a query tile and of one of its keys; ``tail``: share of
            the longest tile that no other work covers; ``kv_passes``: times the keys and values move (the write into the cache
            counts here).
    """
    whole, last_keys, tiles = _tile_keys(new, past, window)
    # With fewer rows than a tile, query heads that share keys share a tile.
    tile_heads = np.minimum(heads, np.maximum(kv_heads, np.multiply(heads, new) / QUERY_TILE))
    key_s = c["key_s"] + 4 * QUERY_TILE * np.asarray(head_dim) * device.units / (
        device.peak_flops_per_s * c["compute_efficiency"]
    )
    work = batch * tile_heads * (tiles * c["tile_s"] + (whole + last_keys) * key_s) / device.units
    compute = work + c["tail"] * (c["tile_s"] + last_keys * key_s)
    rows = np.multiply(batch, head_dim)
    query_bytes = 4.0 * rows * new * heads  # 16-bit queries in, output out
    kv_bytes = 2.0 * rows * kv_heads * kv_item_bytes * (np.minimum(past, window) + new)
    memory = (query_bytes + c["kv_passes"] * kv_bytes) * _uncached(query_bytes + kv_bytes, device, c)
    memory = memory / (device.bandwidth_bytes_per_s * c["bandwidth_efficiency"])
    return c["launch_s"] + _overlap(compute, memory, c["sharpness"])


def decode_attention_s(
    batch: Any,
    keys: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    kv_item_bytes: Any,
    device: Device,
    c: Constants,
    window: Any = np.inf,
    new: Any = 1,
) -> Any:
    """Seconds of attention of one token per sequence (or a few: speculative verify) over a cache.

    Args:
        batch: sequences.
        keys: of each sequence, the new tokens included.
        heads, kv_heads, head_dim: query heads, heads of the cache, their width.
        kv_item_bytes: of one element of the cache, scales included.
        device: peak and bandwidth; only the bandwidth and the units count here.
        c: constants of the class. ``part_s``: latency of one part of the keys of one head; ``key_s`` and ``element_s``: of one
            key, and of one of its elements; ``combine_s``: of adding parts up; ``sequence_s``: of a sequence;
            ``windows_ungrouped``: 1 if query heads do not share keys under a window.
        window: keys a query sees at most; inf = all.
        new: tokens of each sequence that bring queries.
    """
    seen = np.minimum(keys, window)
    apart = np.where(np.isfinite(window), c["windows_ungrouped"], 0.0)
    tile_heads = np.maximum(np.multiply(kv_heads, 1 - apart) + heads * apart, np.multiply(heads, new) / QUERY_TILE)
    blocks = np.asarray(batch * tile_heads, np.float64)
    parts = _leading(KEY_SPLITS, 0, seen, blocks, head_dim)
    key_s = c["key_s"] + c["element_s"] * np.asarray(head_dim)
    part_s = c["part_s"] + np.ceil(np.minimum(keys, np.add(window, KEY_TILE)) / (parts * STEP)) * STEP * key_s
    compute = (np.ceil(blocks * parts / device.units) * part_s + (parts > 1) * c["combine_s"]).min(0)
    rows = np.multiply(batch, head_dim)
    nbytes = 4.0 * rows * new * heads + 2.0 * rows * kv_heads * kv_item_bytes * seen
    memory = nbytes * _uncached(nbytes, device, c) / (device.bandwidth_bytes_per_s * c["bandwidth_efficiency"])
    return c["launch_s"] + c["sequence_s"] * np.asarray(batch) + _overlap(compute, memory, c["sharpness"])


def distinct_experts(tokens: Any, topk: Any, num_experts: Any) -> Any:
    """Experts that `tokens` tokens touch when each picks `topk` of `num_experts` evenly: E (1 - (1 - k/E)^T)."""
    return num_experts * (1.0 - (1.0 - np.minimum(np.divide(topk, num_experts), 1.0)) ** tokens)


def moe_s(
    tokens: Any,
    hidden: Any,
    inter: Any,
    topk: Any,
    num_experts: Any,
    weight_bytes_per_expert: Any,
    device: Device,
    c: Constants,
    expert_ranks: Any = 1,
    skewed: Any = 0.0,
) -> Any:
    """Seconds of the gated experts of one layer on one rank, router excluded.

    Args:
        tokens: of all ranks that share the experts.
        hidden, inter: width of a token, and of an expert on this rank.
        topk, num_experts: experts a token picks, of how many on all ranks.
        weight_bytes_per_expert: of the three matrices on this rank, scales included.
        device: peak of the dtype multiplied in.
        c: constants of the class. ``step_s``, ``edge_s``, ``wave_s``: as in `gemm_s`; ``padding``: tiles an expert wastes;
            ``passes``: times the activations of all picks move; ``pick_s``: latency of one pick of one token; ``rank_skew``:
            picks of the busiest rank above its even share, where the router is skewed.
        expert_ranks: ranks that share the experts evenly.
        skewed: 1 where the router sends far more to some experts than to others, 0 where it is even.
    """
    picks = np.multiply(tokens, topk)
    touched = distinct_experts(tokens, topk, num_experts) / expert_ranks
    # The rank that is timed is the busiest one, and it has at least one expert to run.
    touched = np.maximum(touched, np.minimum(np.divide(num_experts, expert_ranks), 1.0))
    own = picks / expert_ranks * (1 + c["rank_skew"] * np.asarray(skewed) * (1 - np.divide(1, expert_ranks)))
    own = np.maximum(own, touched)
    gate_up = _grouped_s(own, touched, np.multiply(2, inter), hidden, weight_bytes_per_expert * (2 / 3), device, c)
    down = _grouped_s(own, touched, hidden, inter, weight_bytes_per_expert * (1 / 3), device, c)
    moved = 2.0 * picks * (np.multiply(3, inter) + hidden)  # 16-bit: gate and up in, product out, output summed
    rest = c["passes"] * moved / device.bandwidth_bytes_per_s + c["pick_s"] * picks
    return c["launch_s"] + gate_up + down + rest


def collective_s(kind: str, nbytes: Any, ranks: Any, link_bytes_per_s: Any, c: Constants) -> Any:
    """Seconds of a collective between the ranks of one node.

    Args:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``all_to_all``.
        nbytes: of the whole message: what every rank holds before an all-reduce, a reduce-scatter or an all-to-all, and after
            an all-gather.
        ranks: taking part; one rank takes no time.
        link_bytes_per_s: of one rank, each way.
        c: constants of the class. ``hop_s``: latency of one more rank; ``kept``: share of a rank's own part that need not
            travel (1 in a ring); ``contention``: power of ranks with which a shared link slows down (0 = a switch).
    """
    ranks = np.asarray(ranks, np.float64)
    passes = 2.0 if kind == "all_reduce" else 1.0
    latency = c["launch_s"] + c["hop_s"] * (ranks - 1)
    travel = passes * np.asarray(nbytes) * (1 - c["kept"] / ranks) * (ranks / 2) ** c["contention"]
    travel = travel / (link_bytes_per_s * c["bandwidth_efficiency"])
    return np.where(ranks > 1, _overlap(latency, travel, c["sharpness"]), 0.0)


@dataclass(frozen=True, slots=True)
class Form:
    """A form and the names of its constants."""

    function: Callable[..., Any]
    constants: tuple[str, ...]


_THREE = ("compute_efficiency", "bandwidth_efficiency", "launch_s")
_CACHE = ("cache_saving", "cache_share")

#: Name -> form, as the TOML files name it.
FORMS: dict[str, Form] = {
    "roofline": Form(roofline_s, _THREE),
    "gemm": Form(
        gemm_s,
        (*_THREE, "step_s", "edge_s", "wave_s", "split_s", "sharpness", "input_bytes", "output_bytes", *_CACHE),
    ),
    "prefill_attention": Form(
        prefill_attention_s, (*_THREE, "tile_s", "key_s", "tail", "kv_passes", "sharpness", *_CACHE)
    ),
    "decode_attention": Form(
        decode_attention_s,
        (
            *("bandwidth_efficiency", "launch_s", "part_s", "key_s", "element_s", "combine_s", "sequence_s"),
            *("sharpness", "windows_ungrouped", *_CACHE),
        ),
    ),
    "moe": Form(
        moe_s,
        (*_THREE, "step_s", "edge_s", "wave_s", "padding", "passes", "pick_s", "rank_skew", "sharpness"),
    ),
    "collective": Form(collective_s, ("bandwidth_efficiency", "launch_s", "hop_s", "kept", "contention", "sharpness")),
}


def _leading(values: tuple[float, ...], before: int, *sizes: Any) -> Array:
    """Values along an axis of their own in front of everything the sizes span, with `before` - 1 more behind it."""
    dimensions = max(np.ndim(size) for size in sizes)
    trailing = (1,) * (dimensions + max(before - 1, 0))
    return np.asarray(values, np.float64).reshape(len(values), *trailing)


def _tile_step_s(rows: Array, columns: Array, device: Device, c: Constants) -> Array:
    """Seconds of one k in an output tile."""
    rate = device.peak_flops_per_s / device.units * c["compute_efficiency"]
    return 2 * rows * columns / rate + (rows + columns) * c["edge_s"] + c["step_s"]


def _grouped_s(
    rows: Any, experts: Any, n: Any, k: Any, weight_bytes_per_expert: Any, device: Device, c: Constants
) -> Any:
    """Seconds of one product of every expert with its own rows, `rows` of all together."""
    rows, experts, n, k = (np.asarray(size, np.float64) for size in (rows, experts, n, k))
    height, width = (_leading(side, 1, rows, n, k) for side in zip(*MOE_TILES, strict=True))
    tiles = np.maximum(experts, rows / height + c["padding"] * experts) * np.ceil(n / width)
    compute = np.ceil(tiles / device.units) * (k * _tile_step_s(height, width, device, c) + c["wave_s"])
    nbytes = experts * weight_bytes_per_expert + 2.0 * rows * (n + k)
    memory = nbytes / (device.bandwidth_bytes_per_s * c["bandwidth_efficiency"])
    return _overlap(compute.min(0), memory, c["sharpness"])


def _tile_keys(new: Any, past: Any, window: Any) -> tuple[Any, Any, Any]:
    """(keys that all query tiles but the last see, keys of the last, tiles) of one causal head."""
    tiles = np.ceil(np.divide(new, QUERY_TILE))
    whole = tiles - 1
    end = np.add(past, new)
    most = np.minimum(np.add(window, QUERY_TILE), end)
    # Tile j ends at past + (j + 1) * QUERY_TILE and sees all before it until the window cuts off its start.
    growing = np.clip(np.floor((most - past) / QUERY_TILE), 0, whole)
    keys = growing * past + QUERY_TILE / 2 * growing * (growing + 1) + (whole - growing) * most
    return keys, most, tiles


def _uncached(working_set_bytes: Any, device: Device, c: Constants) -> Any:
    """Time of a byte as a share of its time from memory: less where the working set stays in the last-level cache."""
    if not device.llc_bytes:
        return 1.0
    return 1 - c["cache_saving"] / (1 + np.square(working_set_bytes / (c["cache_share"] * device.llc_bytes)))


def _overlap(x: Any, y: Any, sharpness: float) -> Any:
    """(x^p + y^p)^(1/p), taking the larger out first so that no power over- or underflows."""
    longer, shorter = np.maximum(x, y), np.minimum(x, y)
    return longer * (1 + (shorter / np.maximum(longer, 1e-300)) ** sharpness) ** (1 / sharpness)
