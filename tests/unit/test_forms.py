"""Forms: against plain loops that count tiles, waves and keys one by one, and against cases that can be said in a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from trimtab.predict import forms
from trimtab.predict.forms import FORMS, Device

GPU = Device(peak_flops_per_s=3e14, bandwidth_bytes_per_s=2e12, llc_bytes=4e7, units=108)

CONSTANTS = {
    "compute_efficiency": 0.8, "bandwidth_efficiency": 0.7, "launch_s": 3e-6, "step_s": 7e-10, "edge_s": 4e-12,
    "wave_s": 6e-7, "split_s": 5e-7, "sharpness": 3.0, "input_bytes": 2.5, "output_bytes": 0.5, "cache_saving": 0.4,
    "cache_share": 0.3, "tile_s": 9e-7, "key_s": 3e-9, "tail": 0.6, "kv_passes": 2.0, "part_s": 1.5e-6,
    "element_s": 2e-10, "combine_s": 2e-6, "sequence_s": 2e-9, "windows_ungrouped": 0.0, "padding": 0.5, "passes": 1.5,
    "pick_s": 1e-10, "rank_skew": 1.2, "hop_s": 1e-6, "kept": 0.7, "contention": 0.2,
}  # fmt: skip


def p_norm(x: float, y: float) -> float:
    p = CONSTANTS["sharpness"]
    return (x**p + y**p) ** (1 / p)


def cached(nbytes: float) -> float:
    """Time of the bytes of one kernel, some of them found in the cache."""
    c = CONSTANTS
    saved = c["cache_saving"] / (1 + (nbytes / (c["cache_share"] * GPU.llc_bytes)) ** 2)
    return (1 - saved) / (GPU.bandwidth_bytes_per_s * c["bandwidth_efficiency"])


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 256, 512), (17, 4096, 4096), (128, 11008, 4096), (5000, 333, 1000), (16384, 8192, 28672)]
)
def test_a_product_takes_its_cheapest_tile_and_split(m: int, n: int, k: int) -> None:
    c = CONSTANTS
    times = []
    for rows, columns in forms.GEMM_TILES:
        for splits in forms.GEMM_SPLITS:
            tiles = math.ceil(m / rows) * math.ceil(n / columns) * splits
            depth = 64 * math.ceil(k / splits / 64)
            step = 2 * rows * columns * GPU.units / (GPU.peak_flops_per_s * c["compute_efficiency"])
            step += (rows + columns) * c["edge_s"] + c["step_s"]
            waves = math.ceil(tiles / GPU.units)
            times.append(waves * (depth * step + c["wave_s"]) + (splits - 1) * c["split_s"])
    nbytes = 2 * (n * k + m * k + m * n)
    extra = (c["input_bytes"] * m * k + c["output_bytes"] * m * n) / GPU.bandwidth_bytes_per_s
    wanted = c["launch_s"] + extra + p_norm(min(times), nbytes * cached(nbytes))
    got = forms.gemm_s(m, n, k, 2 * n * k, 2 * m * (n + k), GPU, c)
    assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("window", [np.inf, 128, 1000])
@pytest.mark.parametrize(("new", "past"), [(1, 0), (64, 0), (300, 0), (512, 3000), (5, 4096), (1000, 100)])
def test_prefill_counts_the_keys_of_every_query_tile(new: int, past: int, window: float) -> None:
    c, batch, heads, kv_heads, head_dim, item = CONSTANTS, 3, 32, 8, 128, 2
    tiles = math.ceil(new / 64)
    seen = []
    for tile in range(tiles):
        end = past + min((tile + 1) * 64, new)  # keys before the last row of the tile
        seen.append(min(end, window + 64, past + new))
    per_key = c["key_s"] + 4 * 64 * head_dim * GPU.units / (GPU.peak_flops_per_s * c["compute_efficiency"])
    together = min(heads, max(kv_heads, heads * new / 64))
    work = batch * together * sum(c["tile_s"] + keys * per_key for keys in seen) / GPU.units
    compute = work + c["tail"] * (c["tile_s"] + seen[-1] * per_key)
    queries = 4 * batch * new * heads * head_dim
    keys = 2 * batch * kv_heads * head_dim * item * (min(past, window) + new)
    memory = (queries + c["kv_passes"] * keys) * cached(queries + keys)
    wanted = c["launch_s"] + p_norm(compute, memory)
    got = forms.prefill_attention_s(batch, new, past, heads, kv_heads, head_dim, window, item, GPU, c)
    assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("apart", [0.0, 1.0])
@pytest.mark.parametrize("window", [np.inf, 128])
@pytest.mark.parametrize(
    ("batch", "keys", "new"), [(1, 2, 1), (1, 100_000, 1), (16, 1000, 1), (300, 5000, 1), (4, 777, 5)]
)
def test_decode_splits_the_keys_as_is_cheapest(batch: int, keys: int, new: int, window: float, apart: float) -> None:
    c = CONSTANTS | {"windows_ungrouped": apart}
    heads, kv_heads, head_dim, item = 40, 8, 128, 1
    alone = heads if apart and np.isfinite(window) else kv_heads
    blocks = batch * max(alone, heads * new / 64)
    seen = min(keys, window)
    per_key = c["key_s"] + c["element_s"] * head_dim
    times = []
    for parts in forms.KEY_SPLITS:
        worked = 64 * math.ceil(min(keys, window + 128) / parts / 64)
        waves = math.ceil(blocks * parts / GPU.units)
        times.append(waves * (c["part_s"] + worked * per_key) + (c["combine_s"] if parts > 1 else 0))
    nbytes = 4 * batch * new * heads * head_dim + 2 * batch * kv_heads * head_dim * item * seen
    wanted = c["launch_s"] + c["sequence_s"] * batch + p_norm(min(times), nbytes * cached(nbytes))
    got = forms.decode_attention_s(batch, keys, heads, kv_heads, head_dim, item, GPU, c, window=window, new=new)
    assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("ranks", "skewed"), [(1, 0), (1, 1), (4, 0), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 8, 300, 20_000])
def test_experts_are_two_grouped_products(tokens: int, ranks: int, skewed: int) -> None:
    c, hidden, inter, topk, experts = CONSTANTS, 4096, 1536, 8, 128
    each = 3 * hidden * inter * 2
    touched = max(experts * (1 - (1 - topk / experts) ** tokens) / ranks, 1)
    own = max(tokens * topk / ranks * (1 + c["rank_skew"] * skewed * (1 - 1 / ranks)), touched)
    wanted = c["launch_s"] + c["pick_s"] * tokens * topk
    wanted += c["passes"] * 2 * tokens * topk * (3 * inter + hidden) / GPU.bandwidth_bytes_per_s
    for n, k, nbytes in ((2 * inter, hidden, each * 2 / 3), (hidden, inter, each / 3)):
        times = []
        for rows, columns in forms.MOE_TILES:
            tiles = max(touched, own / rows + c["padding"] * touched) * math.ceil(n / columns)
            step = 2 * rows * columns * GPU.units / (GPU.peak_flops_per_s * c["compute_efficiency"])
            step += (rows + columns) * c["edge_s"] + c["step_s"]
            times.append(math.ceil(tiles / GPU.units) * (k * step + c["wave_s"]))
        moved = touched * nbytes + 2 * own * (n + k)
        wanted += p_norm(min(times), moved / (GPU.bandwidth_bytes_per_s * c["bandwidth_efficiency"]))
    got = forms.moe_s(tokens, hidden, inter, topk, experts, each, GPU, c, expert_ranks=ranks, skewed=skewed)
    assert got == pytest.approx(wanted, rel=1e-12)


def test_eight_tokens_of_mixtral_touch_seven_experts() -> None:
    assert forms.distinct_experts(1, 2, 8) == pytest.approx(2)
    assert forms.distinct_experts(8, 2, 8) == pytest.approx(8 * (1 - 0.75**8))
    assert forms.distinct_experts(3, 8, 8) == 8


def test_a_ring_moves_its_bytes_twice_to_reduce() -> None:
    c = CONSTANTS | {"launch_s": 0.0, "hop_s": 0.0, "kept": 1.0, "contention": 0.0, "bandwidth_efficiency": 1.0}
    gathered = forms.collective_s("all_gather", 8e8, 8, 1e11, c)
    assert gathered == pytest.approx(7 / 8 * 8e8 / 1e11)
    assert forms.collective_s("all_reduce", 8e8, 8, 1e11, c) == pytest.approx(2 * gathered)
    assert forms.collective_s("all_reduce", 8e8, 1, 1e11, CONSTANTS) == 0
    empty = forms.collective_s("all_to_all", 0, 4, 1e11, CONSTANTS)
    assert empty == pytest.approx(CONSTANTS["launch_s"] + 3 * CONSTANTS["hop_s"])


def test_fewer_weight_bytes_help_few_rows_only() -> None:
    n = k = 8192

    def time(m: int, bits: float) -> float:
        return float(forms.gemm_s(m, n, k, n * k * bits / 8, 2 * m * (n + k), GPU, CONSTANTS))

    assert time(1, 4) < 0.6 * time(1, 16)
    assert time(4096, 4) > 0.95 * time(4096, 16)


def test_a_working_set_beyond_the_cache_costs_the_saving() -> None:
    small = forms.gemm_s(1, 1024, 1024, 2**21, 4096, GPU, CONSTANTS | {"sharpness": 50.0, "compute_efficiency": 1e3})
    large = forms.gemm_s(
        1,
        1024,
        1024,
        2**21,
        4096,
        GPU,
        CONSTANTS | {"sharpness": 50.0, "compute_efficiency": 1e3},
        working_set_bytes=1e12,
    )
    without = forms.gemm_s(
        1,
        1024,
        1024,
        2**21,
        4096,
        Device(3e14, 2e12, 0, 108),
        CONSTANTS | {"sharpness": 50.0, "compute_efficiency": 1e3},
    )
    assert small < large == pytest.approx(without)


def test_sharpness_goes_from_the_sum_to_the_longer_part() -> None:
    assert forms._overlap(3e-6, 4e-6, 1.0) == pytest.approx(7e-6)
    assert forms._overlap(3e-6, 4e-6, 2.0) == pytest.approx(5e-6)
    assert forms._overlap(3e-6, 4e-6, 200.0) == pytest.approx(4e-6)
    assert forms._overlap(0.0, 0.0, 3.0) == 0


class Watched(Mapping[str, float]):
    """Constants that remember who was asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> float:
        self.asked.add(name)
        return CONSTANTS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(CONSTANTS)

    def __len__(self) -> int:
        return len(CONSTANTS)


CALLS: dict[str, dict[str, Any]] = {
    "roofline": {"flops": 1e12, "nbytes": 1e9, "device": GPU},
    "gemm": {"m": 8, "n": 512, "k": 512, "weight_bytes": 2**19, "io_bytes": 2**14, "device": GPU},
    "prefill_attention": {
        "batch": 1, "new": 100, "past": 0, "heads": 8, "kv_heads": 2, "head_dim": 64, "window": np.inf, "kv_item_bytes": 2,
        "device": GPU,
    },
    "decode_attention": {
        "batch": 1, "keys": 100, "heads": 8, "kv_heads": 2, "head_dim": 64, "kv_item_bytes": 2, "device": GPU,
    },
    "moe": {
        "tokens": 3, "hidden": 512, "inter": 256, "topk": 2, "num_experts": 8, "weight_bytes_per_expert": 786_432,
        "device": GPU,
    },
    "collective": {"kind": "all_reduce", "nbytes": 1e6, "ranks": 4, "link_bytes_per_s": 1e11},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_form_names_the_constants_it_uses(name: str) -> None:
    watched = Watched()
    assert np.all(FORMS[name].function(**CALLS[name], c=watched) > 0)
    assert watched.asked == set(FORMS[name].constants)
    assert len(FORMS[name].constants) <= 20
