"""A GPT from its sizes alone: what tables and papers give of models that have no config."""

from __future__ import annotations

import functools

from trimtab.spec.families.facts import Facts
from trimtab.spec.families.layernorm import gpt2
from trimtab.spec.model import ModelSpec


@functools.cache
def gpt(name: str, layers: int, hidden: int, heads: int, vocab: int, positions: int) -> ModelSpec:
    """A GPT of these sizes: LayerNorm with biases, plain FFN four times as wide, learned positions, tied embedding.

    Raises:
        SpecError: sizes that do not go together.
    """
    config = {
        "model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": vocab,
        "n_positions": positions, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    return gpt2(Facts(name, config))
