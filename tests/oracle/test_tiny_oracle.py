"""A saved tiny model in transformers: the same ids and the same logits."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from trimtab.runtime.text.builtin import builtin_text
from trimtab.train.tiny import TinyConfig, train_tiny

SMALL = TinyConfig(layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=300, context=16, batch=4, lr=1e-2)


def test_transformers_reads_a_saved_tiny_model(tmp_path: Path) -> None:
    text = builtin_text()[:6000]
    trained = train_tiny(SMALL, [text], 10)
    folder = trained.save(tmp_path / "tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = trained.backend.encode(text).ids[:16]
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:16] == ids
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits
    assert torch.allclose(trained.model().logits(ids), wanted, atol=1e-4)
