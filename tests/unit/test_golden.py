"""The published numbers of the operator model, to the last digit the source prints.

Source: Yuan et al., LLM Inference Unveiled, arXiv 2402.16363; the golden values are recomputed from the models' configs:
matrix multiplications, causal pairs, head at the last position, fp16, batch 1.
"""

from __future__ import annotations

import pytest

from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import StepShape
from trimtab.spec.configs import active_parameters, load_spec

# parameters, FLOP of a 2048-token prompt, FLOP of a decode step behind 2048 tokens, KV bytes per token, matrix bytes per step
GOLDEN = {
    "smollm2-135m": (134_515_008, "5.79948e+11", "4.10587e+08", 23_040, "2.6896e+08"),
    "llama-2-7b": (6_738_415_616, "2.7626e+13", "1.42884e+10", 524_288, "1.32142e+10"),
    "llama-3.1-8b": (8_030_261_248, "2.96884e+13", "1.60836e+10", 131_072, "1.50093e+10"),
    "llama-3.1-70b": (70_553_706_496, "2.85878e+14", "1.44375e+11", 327_680, "1.39003e+11"),
}
PROMPT = StepShape.of([2048], [0], logits=1)
DECODE = StepShape.of([1], [2048], logits=1)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_table(name: str) -> None:
    parameters, prefill, decode, kv, read = GOLDEN[name]
    spec = load_spec(name)
    graph = build(spec)
    assert spec.num_parameters() == parameters
    assert spec.kv_nbytes(1) == kv
    assert f"{sum(int(count(op, PROMPT, 'tiled').flops) for op in graph.ops):.6g}" == prefill
    assert f"{sum(int(count(op, DECODE, 'tiled').flops) for op in graph.ops):.6g}" == decode
    matrices = sum(int(count(op, DECODE, "tiled").weight_read) for op in graph.ops if op.kind == "linear")
    assert f"{matrices:.6g}" == read


def test_golden_experts_and_latent_attention() -> None:
    mixtral, deepseek = load_spec("mixtral-8x7b"), load_spec("deepseek-v3")
    assert (mixtral.num_parameters(), active_parameters(mixtral)) == (46_702_792_704, 12_879_925_248)
    assert mixtral.kv_nbytes(1) == 131_072
    assert deepseek.num_parameters() == 671_026_419_200
    assert f"{active_parameters(deepseek):.4g}" == "3.755e+10"
    assert deepseek.kv_nbytes(1) == 70_272


# One layer of Llama-2-7B: (operations, bytes) as the paper's roofline table prints them, three digits.
LAYER = {
    "self_attn.q_proj": ("6.87e+10", "6.71e+07", "3.36e+07", "3.36e+07"),
    "self_attn.o_proj": ("6.87e+10", "6.71e+07", "3.36e+07", "3.36e+07"),
    "mlp.gate_proj": ("1.85e+11", "1.52e+08", "9.02e+07", "9.02e+07"),
    "mlp.up_proj": ("1.85e+11", "1.52e+08", "9.02e+07", "9.02e+07"),
    "mlp.down_proj": ("1.85e+11", "1.52e+08", "9.02e+07", "9.02e+07"),
}


@pytest.mark.parametrize("name", LAYER)
def test_layer_table(name: str) -> None:
    op = next(op for op in build(load_spec("llama-2-7b")).ops if op.name == f"layers.0.{name}")
    # The paper's decode is priced at 2048 keys; the linear ops do not see them.
    prefill, decode = count(op, PROMPT), count(op, DECODE)
    assert (
        f"{int(prefill.flops):.3g}",
        f"{int(prefill.nbytes):.3g}",
        f"{int(decode.flops):.3g}",
        f"{int(decode.nbytes):.3g}",
    ) == LAYER[name]


def test_eager_attention_is_qk_softmax_and_sv_of_the_layer_table() -> None:
    op = next(op for op in build(load_spec("llama-2-7b")).ops if op.name == "layers.0.self_attn.attend")
    prefill = count(op, PROMPT)
    assert f"{int(prefill.flops) / 2:.3g}" == "3.44e+10"  # QK, and as many for SV
    assert f"{int(prefill.vector_flops):.3g}" == "6.71e+08"  # softmax
    # Bytes: QK 302 MB and SV 302 MB, softmax 537 MB.
    assert f"{int(prefill.nbytes):.4g}" == f"{2 * 301_989_888 + 536_870_912:.4g}"
    decode = count(op, StepShape.of([1], [2047], logits=1))  # 2048 keys with the new one
    assert (f"{int(decode.flops) / 2:.3g}", f"{int(decode.vector_flops):.3g}") == ("1.68e+07", "3.28e+05")
    assert f"{int(decode.nbytes):.3g}" == f"{2 * 16_900_000 + 262_144:.3g}"
