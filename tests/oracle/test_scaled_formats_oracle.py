"""fp8 and mxfp4 against torch, gguf and transformers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.numerics.scaled import E2M1_VALUES, E4M3_VALUES, nearest_codes
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import WeightFormat

FP8, MXFP4 = WeightFormat(kind="fp8"), WeightFormat(kind="mxfp4")


def wide(count: int, seed: int = 0) -> np.ndarray:
    """Values over many powers of two, zeros among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count) * np.exp2(rng.uniform(-20, 8, count))
    values[::97] = 0
    return values.astype(np.float32)


def test_every_fp8_code_is_torch_s() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3_VALUES, theirs)


def test_fp8_rounds_as_torch_does() -> None:
    """Random values and every point half way between two codes, where a tie must go to the even one."""
    torch = pytest.importorskip("torch")
    points = E4M3_VALUES[:127]
    values = np.concatenate((np.clip(wide(200_000), -448, 448), points, (points[1:] + points[:-1]) / 2))
    ours = nearest_codes(values, points) | np.where(np.signbit(values), 128, 0).astype(np.uint8)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_an_fp8_matrix_is_torch_s_codes_times_its_scales() -> None:
    torch = pytest.importorskip("torch")
    values = wide(6 * 80).reshape(6, 80)
    values[3] = 0
    packed = encode(values, FP8)
    scale = np.abs(values).max(1, keepdims=True) / np.float32(448)
    np.testing.assert_array_equal(packed.buffers["scale"], scale)
    step = torch.from_numpy(np.where(scale > 0, scale, 1).astype(np.float32))
    codes = (torch.from_numpy(values) / step).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(packed.buffers["data"], codes.view(torch.uint8).numpy())
    np.testing.assert_array_equal(decode(packed), (codes.float() * torch.from_numpy(scale)).numpy())


def test_mxfp4_rounds_and_scales_as_gguf_does() -> None:
    """gguf keeps the same codes in another order: of 32 the first 16 in the low halves of its bytes."""
    gguf = pytest.importorskip("gguf")
    values = wide(8 * 96, seed=1).reshape(8, 96)
    values[2, 32:64] = 0
    packed = encode(values, MXFP4)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.MXFP4).reshape(8, 3, 17)
    theirs = gguf.quants.dequantize(blocks.reshape(8, -1), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(decode(packed), theirs)


def test_mxfp4_reads_the_blocks_of_a_checkpoint_as_transformers_does() -> None:
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (5, 64), np.uint8)
    scale = rng.integers(100, 150, (5, 4), np.uint8)
    ours = decode(Packed(MXFP4, (5, 128), {"codes": codes, "scale": scale}))
    theirs = mxfp4.convert_moe_packed_tensors(
        torch.from_numpy(codes.reshape(1, 5, 4, 16)), torch.from_numpy(scale[None]), dtype=torch.float32
    )
    np.testing.assert_array_equal(ours, theirs[0].numpy().T)
    assert sorted(set(E2M1_VALUES.tolist())) == sorted(set(mxfp4.FP4_VALUES))
