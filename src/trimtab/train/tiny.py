"""A tiny Llama trained from scratch in float32: what a model that was never rounded loses when it is quantized.

The built-in model cannot show that: its file holds 4-bit blocks. A tiny model is trained in minutes on text the caller names, by
seed, and kept as an ordinary Hugging Face folder that `trimtab.load` opens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import CalibrationError, SpecError
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.configs import spec_from_config
from trimtab.spec.formats import FP32
from trimtab.spec.machine import home
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer as Backend

    from trimtab.model.variant import Model
    from trimtab.train.fit import Product, Progress

#: Part of the key of every trained folder: raised when equal settings train another model.
_REVISION = 1
#: Ends a text.
END = "<|endoftext|>"
#: Spread of the embedding before training: it is the head too, and logits start near 0.
_SPREAD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """Shape of a tiny Llama with a tied head, and how it is trained.

    Args:
        layers, hidden, ffn, heads, kv_heads: shape.
        vocab: tokens of the byte-level BPE that is trained on the text; 257 = bytes alone.
        context: tokens of a window.
        batch: windows of an update.
        lr: peak of the learning rate.

    Raises:
        SpecError: a number that is not possible.
    """

    layers: int = 4
    hidden: int = 256
    ffn: int = 704
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 2048
    context: int = 256
    batch: int = 8
    lr: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "context", "batch"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)} is not possible. Allowed: 1 or more.")
        if self.hidden % (2 * self.heads):
            raise SpecError(
                f"hidden={self.hidden} does not divide into {self.heads} heads of even size. "
                f"Try hidden={2 * self.heads * max(1, round(self.hidden / (2 * self.heads)))}."
            )
        if self.heads % self.kv_heads:
            raise SpecError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}. Try kv_heads=1.")
        if not 257 <= self.vocab <= 65536:
            raise SpecError(f"vocab={self.vocab} is not possible. Allowed: 257 (bytes and an end token) to 65536.")

    def llama(self, vocab: int | None = None) -> dict[str, Any]:
        """As config.json; `vocab` is what the tokenizer came to."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab or self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            "torch_dtype": "float32",
        }


@dataclass(frozen=True, slots=True, eq=False)
class TinyModel:
    """A trained tiny model.

    Args:
        config: its shape and training.
        spec, weights: the model.
        backend: its tokenizer.
        losses: [steps] mean cross-entropy in nats of each update.
        made: steps, seed and hash of the texts.
    """

    config: TinyConfig
    spec: ModelSpec
    weights: Weights
    backend: Backend
    losses: np.ndarray
    made: dict[str, Any]

    def model(self) -> Model:
        """As `trimtab.load` gives it."""
        from trimtab.model.variant import Model, Variant
        from trimtab.runtime.text.tokenizer import Tokenizer

        tokenizer = Tokenizer(self.backend, eos_id=0, template_variables={"eos_token": END})
        return Model(Variant(self.spec, self.weights), lambda: tokenizer)

    def save(self, folder: str | Path) -> Path:
        """Write a Hugging Face folder, whole or not at all.

        Raises:
            SpecError: something of that name is there.
        """
        with whole_folder(Path(folder)) as fresh:
            self.write(fresh)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the files of `save` into a folder that is there."""
        from safetensors.numpy import save_file

        tensors = {_tensor_name(path): _tensor(packed) for path, packed in self.weights.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.backend.save(str(folder / "tokenizer.json"))
        for name, content in (
            ("config.json", self.config.llama(self.spec.vocab_size)),
            ("tokenizer_config.json", {"eos_token": END, "model_max_length": self.config.context}),
            ("training.json", self.made | {"config": dataclasses.asdict(self.config), "losses": self.losses.tolist()}),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def train_tiny(
    config: TinyConfig,
    texts: Mapping[str, str] | Sequence[str],
    steps: int,
    seed: int = 0,
    product: Product | None = None,
    progress: Progress | None = None,
) -> TinyModel:
    """Train a tiny model from scratch.

    Args:
        config: shape and training.
        texts: what it reads, and what its tokenizer is trained on.
        steps: updates of ``batch * context`` tokens.
        seed: of the first weights and of the order of the text.
        product: replaces the product of every linear layer, ``(path, x [T, K], W [N, K]) -> [T, N]``. This is where a
            fake-quantizing forward is plugged in; `fit` shows one. To fine-tune a model that is trained already, with or
            without such a product, call `fit` with its spec and weights.
        progress: wraps the steps and shows a bar, ``progress(label, items)``.

    Returns:
        The model; equal arguments and numbers of threads give equal weights.

    Raises:
        CalibrationError: no text, or fewer tokens than a window.
        SpecError: a loss that is no number.
    """
    from trimtab.train.fit import Fit, fit

    listed = list(texts.values()) if isinstance(texts, Mapping) else list(texts)
    backend = train_tokenizer(listed, config.vocab)
    ids = np.concatenate([[*backend.encode(text).ids, 0] for text in listed]).astype(np.int64)
    spec = spec_from_config(config.llama(backend.get_vocab_size()), f"tiny-{config.layers}x{config.hidden}")
    spec = spec.with_dtype("float32")
    how = Fit(steps=steps, batch=config.batch, window=config.context, lr=config.lr, seed=seed)
    found = fit(spec, initial_weights(spec, seed), ids, how, product, progress)
    made = {"revision": _REVISION, "steps": steps, "seed": seed, "texts_sha256": _text_hash(listed), "tokens": len(ids)}
    return TinyModel(config, spec, found.weights, backend, found.losses, made)


def tiny_folder(
    config: TinyConfig,
    texts: Mapping[str, str] | Sequence[str],
    steps: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """The folder of a tiny model, trained now or before: kept under `home()` by the hash of settings and texts."""
    folder = folder_of(config, texts, steps, seed)
    if not folder.is_dir():
        train_tiny(config, texts, steps, seed, progress=progress).save(folder)
    return folder


def folder_of(config: TinyConfig, texts: Mapping[str, str] | Sequence[str], steps: int, seed: int = 0) -> Path:
    """Where `tiny_folder` keeps a model: one name for equal settings and texts."""
    listed = list(texts.values()) if isinstance(texts, Mapping) else list(texts)
    settings = [_REVISION, dataclasses.asdict(config), steps, seed, _text_hash(listed)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return home() / "models" / f"tiny-{digest}"


def steps_within(config: TinyConfig, minutes: float) -> int:
    """How many updates take so many minutes on this machine, by timing a few.

    Raises:
        SpecError: no time.
    """
    from trimtab.train.fit import Fit, fit

    if not minutes > 0:
        raise SpecError(f"minutes={minutes} is not possible. Allowed: above 0. Try 4.")
    spec = spec_from_config(config.llama(), "tiny").with_dtype("float32")
    ids = np.arange(config.batch * config.context * 2) % config.vocab
    weights, taken = initial_weights(spec, 0), []
    for steps in (1, 4):  # building the decoder and the first pass are in both
        start = time.perf_counter()
        fit(spec, weights, ids, Fit(steps=steps, batch=config.batch, window=config.context, lr=config.lr))
        taken.append(time.perf_counter() - start)
    return max(1, int(60 * minutes / max((taken[1] - taken[0]) / 3, 1e-4)))


def train_tokenizer(texts: Sequence[str], vocab: int) -> Backend:
    """Train a byte-level BPE: every text has ids, and ids give it back. Id 0 ends a text.

    Raises:
        CalibrationError: there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not any(texts):
        raise CalibrationError("There is no text to train on. Give at least one.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def initial_weights(spec: ModelSpec, seed: int) -> Weights:
    """Weights before training: matrices N(0, 1 / inputs), those that add to the residual stream smaller by the root of their number.

    Matrices of a hidden size this small learn faster from there than from 0.02 for all, which is made for large ones.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3 (the residual stream).
    """
    rng = np.random.default_rng(seed)
    found = {}
    for path, packed in random_weights(spec, seed).items():
        if packed.shape[0] == 1:
            found[path] = encode(np.ones(packed.shape, np.float32), FP32)
            continue
        spread = _SPREAD if path == "embed_tokens" else 1 / math.sqrt(packed.shape[1])
        if path.endswith((".o_proj", ".down_proj")):
            spread /= math.sqrt(2 * spec.num_hidden_layers)
        found[path] = encode(spread * rng.standard_normal(packed.shape, dtype=np.float32), FP32)
    return Weights(found)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that gets its name at the end; after an error or an interrupt nothing is left.

    Raises:
        SpecError: something of that name is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder} is there already. Give another name, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield fresh
        fresh.chmod(0o755)
        try:
            fresh.replace(folder)  # an empty folder of that name gives way
        except OSError as error:
            raise SpecError(f"{folder} could not be named: {error.strerror}. Give another name.") from None
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _tensor_name(path: str) -> str:
    return f"model.{path}.weight"


def _tensor(packed: Packed) -> np.ndarray:
    array = decode(packed)
    return np.ascontiguousarray(array[0] if len(array) == 1 else array)


def _text_hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
