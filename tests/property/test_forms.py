"""Every form stays or grows when any of its sizes grows, whatever its constants; arrays give what their elements give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.predict.forms import FORMS, Device

SHARES = {"compute_efficiency", "bandwidth_efficiency", "cache_saving", "kept", "windows_ungrouped", "tail"}

#: Form -> size -> least and most.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "roofline": {"flops": (0, 10**15), "nbytes": (0, 10**12)},
    "gemm": {"m": (1, 40_000), "n": (1, 70_000), "k": (1, 70_000)},
    "prefill_attention": {
        "batch": (1, 300), "new": (1, 20_000), "past": (0, 100_000), "heads": (1, 128), "kv_heads": (1, 128),
        "head_dim": (8, 512),
    },
    "decode_attention": {
        "batch": (1, 3000), "keys": (1, 200_000), "heads": (1, 128), "kv_heads": (1, 128), "head_dim": (8, 512),
        "new": (1, 16),
    },
    "moe": {
        "tokens": (1, 70_000), "hidden": (16, 10_000), "inter": (16, 30_000), "topk": (1, 16), "num_experts": (16, 512),
    },
    "collective": {"nbytes": (0, 10**10), "ranks": (1, 64)},
}  # fmt: skip


def by_magnitude(least: int, most: int) -> st.SearchStrategy[int]:
    """Whole numbers, the small ones often, since edges of tiles lie among them."""
    small = st.floats(0, 1).map(lambda share: least - 1 + round((most - least + 1) ** share))
    return st.one_of(small, st.integers(least, most))


@st.composite
def cases(draw: st.DrawFn, form: str) -> tuple[dict[str, float], Device, dict[str, int], dict[str, Any]]:
    """(constants, device, sizes, settings that are no sizes)."""
    constants = {}
    for name in FORMS[form].constants:
        if name in SHARES:
            constants[name] = draw(st.floats(0.01, 1.0))
        elif name.endswith("_s"):
            constants[name] = 10.0 ** draw(st.floats(-13, -4))
        else:
            constants[name] = draw(st.floats(0.05, 20.0))
    device = Device(
        10.0 ** draw(st.floats(11, 16)), 10.0 ** draw(st.floats(10, 13)), draw(st.sampled_from([0.0, 1e6, 1e8])),
        draw(st.integers(1, 300)),
    )  # fmt: skip
    sizes = {name: draw(by_magnitude(*ends)) for name, ends in SIZES[form].items()}
    if "kv_heads" in sizes:
        sizes["kv_heads"] = min(sizes["kv_heads"], sizes["heads"])
    window = draw(st.sampled_from([np.inf, 1, 100, 128, 4096]))
    settings = {
        "prefill_attention": {"window": window, "kv_item_bytes": draw(st.sampled_from([0.5, 1, 2]))},
        "decode_attention": {"window": window, "kv_item_bytes": draw(st.sampled_from([0.5, 1, 2]))},
        "moe": {"expert_ranks": draw(st.sampled_from([1, 2, 16])), "skewed": draw(st.sampled_from([0, 1]))},
        "collective": {"kind": draw(st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]))},
    }
    return constants, device, sizes, settings.get(form, {})


def seconds(
    form: str, constants: dict[str, float], device: Device, sizes: dict[str, Any], extra: dict[str, Any]
) -> Any:
    """The form, with the bytes that follow from the sizes."""
    named = dict(sizes) | extra
    if form == "gemm":
        m, n, k = sizes["m"], sizes["n"], sizes["k"]
        named |= {"weight_bytes": 0.5625 * n * k, "io_bytes": 2 * m * (n + k)}
    if form == "moe":
        named["weight_bytes_per_expert"] = 3.0 * sizes["hidden"] * sizes["inter"]
    if form == "collective":
        return FORMS[form].function(link_bytes_per_s=device.bandwidth_bytes_per_s, c=constants, **named)
    return FORMS[form].function(device=device, c=constants, **named)


@pytest.mark.parametrize(("form", "size"), [(form, size) for form, sizes in SIZES.items() for size in sizes])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_larger_size_never_takes_less(form: str, size: str, data: st.DataObject) -> None:
    constants, device, sizes, extra = data.draw(cases(form))
    most = sizes["heads"] if size == "kv_heads" else SIZES[form][size][1]
    # Small steps find the edges of tiles and waves, large ones everything else.
    step = data.draw(st.one_of(st.integers(1, 4), by_magnitude(1, most)))
    larger = sizes | {size: min(sizes[size] + step, most)}
    before = seconds(form, constants, device, sizes, extra)
    after = seconds(form, constants, device, larger, extra)
    assert np.isfinite(before) and before >= 0
    assert after >= before * (1 - 1e-12)  # the last bits of a sum may differ


@pytest.mark.parametrize("form", sorted(SIZES))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_arrays_broadcast_to_what_their_elements_give(form: str, data: st.DataObject) -> None:
    constants, device, sizes, extra = data.draw(cases(form))
    first, second = list(sizes)[:2]
    row = np.linspace(*SIZES[form][first], 5).round()
    column = np.linspace(*SIZES[form][second], 3).round()[:, None]
    together = seconds(form, constants, device, sizes | {first: row, second: column}, extra)
    assert together.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            alone = seconds(form, constants, device, sizes | {first: row[j], second: column[i, 0]}, extra)
            assert together[i, j] == pytest.approx(float(alone), rel=1e-12)
