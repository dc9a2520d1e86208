"""A tiny model on disk, and a lane of the engine without a process around it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.random import random_weights
from trimtab.sched.trace import Trace
from trimtab.serve import messages as m
from trimtab.serve.config import ServeConfig
from trimtab.serve.engine.cost import StepCost
from trimtab.serve.engine.lane import Lane
from trimtab.serve.engine.models import Models
from trimtab.spec.configs import load_spec
from trimtab.spec.families.sources import wanted

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 96, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32", "eos_token_id": 257,
}  # fmt: skip
COST = StepCost(1e-3, 1e-4, 1e-5, 0.0)


def write_model(folder: Path, backend: Any, template: str) -> Path:
    """Random weights and a byte-level tokenizer, as a folder of the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    spec = load_spec(str(folder))
    values = random_weights(spec)
    header: dict[str, Any] = {}
    body = b""
    for want in wanted(spec):
        array = np.array(decode(values[want.key]).squeeze(), np.float32)
        if want.key == "embed_tokens":  # tied: smaller logits, so that drawing at random means something
            array *= 0.25
        place = [len(body), len(body) + array.nbytes]
        header[f"model.{want.key}.weight"] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": place}
        body += array.tobytes()
    text = json.dumps(header)
    text += " " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)
    backend.save(str(folder / "tokenizer.json"))
    tokens = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


class Bench:
    """A lane, what it says, and a way to go on until all is said."""

    def __init__(self, model: Any, *, kv_bytes: int = 64 << 20, trace: Trace | None = None, **settings: Any) -> None:
        self.start = ServeConfig(
            models=("tiny",), kv_bytes=kv_bytes, **({"step_tokens": 96, "max_sequences": 16} | settings)
        ).start()
        self.said: list[m.Message] = []
        self.now = 0.0
        self.lane = Lane(model, self.start, kv_bytes, COST, self.said.append, trace, lambda: self.now)

    def submit(self, name: str, prompt: Any, *, grammar: m.Grammar | None = None, salt: str = "", deadline_s: float = 0.0,
               priority: int = 0, **sampling: Any) -> None:  # fmt: skip
        drawn = m.Sampling(**({"max_tokens": 12, "temperature": 0.0} | sampling))
        tokens = tuple(int(token) for token in prompt)
        self.lane.submit(
            m.Submit(id=name, model="tiny", prompt=tokens, sampling=drawn, grammar=grammar, salt=salt, deadline_s=deadline_s, priority=priority)
        )  # fmt: skip

    def turn(self) -> None:
        self.now += 0.001
        self.lane.turn()

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.lane.scheduler.busy:
                return
            self.turn()
        raise AssertionError("it did not come to an end")

    def pieces(self, name: str, choice: int = 0) -> list[m.Piece]:
        made = [piece for said in self.said if isinstance(said, m.Tokens) for piece in said.pieces]
        return [piece for piece in made if piece.id == name and piece.choice == choice]

    def ids(self, name: str, choice: int = 0) -> list[int]:
        return [token for piece in self.pieces(name, choice) for token in piece.ids]

    def text(self, name: str, choice: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces(name, choice))

    def finish(self, name: str, choice: int = 0) -> str | None:
        ends = [piece.finish for piece in self.pieces(name, choice) if piece.finish]
        assert len(ends) <= 1
        return ends[0] if ends else None

    def end(self, name: str) -> Any:
        ends = [said for said in self.said if isinstance(said, m.Finished | m.Refused | m.Failed) and said.id == name]
        assert len(ends) == 1, ends
        return ends[0]


def load(folder: Path, **settings: Any) -> Any:
    """The model of a folder, ready for a lane."""
    return Models(ServeConfig(models=(str(folder),), threads=1, **settings).start()).load(str(folder))
