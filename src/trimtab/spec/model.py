"""The whole model: its layers between embedding and head, what it weighs, its dtypes and its hash."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from trimtab.errors import SpecError
from trimtab.spec import tree
from trimtab.spec.cache import HeadSpec, PageFormat, page_format
from trimtab.spec.formats import ITEM_BYTES, SCALED_KINDS, WeightFormat, float_format, weights_name
from trimtab.spec.leaves import ConvSpec, EmbeddingSpec, LinearSpec, NormSpec
from trimtab.spec.nodes import (
    NO_FLOW,
    AttentionSpec,
    FFNSpec,
    FlowSpec,
    GateFirst,
    LayerSpec,
    LinearAttentionSpec,
    MoESpec,
    StateSpaceSpec,
)
from trimtab.spec.product import EXACT
from trimtab.spec.tree import Edit, Node, Written


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Node):
    """A whole decoder-only language model. `history` remembers who edited what; it takes no part in equality or hash.

    `ranks`: embedding and head are one of as many slices of the vocabulary (`graph.shard`).
    """

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    act_dtype: str = "bf16"
    embed_tokens: EmbeddingSpec
    embed_positions: EmbeddingSpec | None = None
    embed_norm: NormSpec | None = None
    layers: tuple[LayerSpec, ...]
    norm: NormSpec | None
    lm_head: LinearSpec
    tie_word_embeddings: bool = False
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    flow: FlowSpec = NO_FLOW
    ranks: int = 1
    history: tuple[Written, ...] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def act_bytes(self) -> int:
        """Bytes of one activation element."""
        return ITEM_BYTES[self.act_dtype]

    @property
    def hash(self) -> str:
        """Hex digest of everything that defines the model; keys caches, artefacts and ledger rows."""
        return _hash(self)

    def edit(self, edits: Iterable[Edit], by: str) -> ModelSpec:
        """Return a copy with the edits made in the name of `by`.

        Raises:
            SpecError: an edit names no node or no field.
            Conflict: another writer set the same field to another value.
        """
        edited, history = tree.edit(self, edits, by, self.history)
        return dataclasses.replace(edited, history=history)

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        """Yield (path, node) of every linear, lm_head included."""
        for path, node in tree.walk(self):
            if isinstance(node, LinearSpec):
                yield path, node

    def node(self, path: str) -> Node:
        """Return the node at `path`.

        Raises:
            SpecError: there is none.
        """
        for found, node in tree.walk(self):
            if found == path:
                return node
        raise SpecError(f"{self.name} has no node '{path}'.")

    def num_parameters(self) -> int:
        """Parameters, ties counted once."""
        return self._sum_owned(lambda node: node.num_parameters() if hasattr(node, "num_parameters") else 0)  # type: ignore[attr-defined]

    def weight_nbytes(self) -> int:
        """Resident bytes of all weights, ties once."""
        return self._sum_owned(weight_nbytes)

    def _sum_owned(self, of: Callable[[Node], int]) -> int:
        """Sum of `of` over all nodes that own weights; layers that are one object are asked once."""

        def total(layers: tuple[LayerSpec, ...]) -> int:
            part = dataclasses.replace(self, layers=layers)
            return sum(of(node) * count for _, node, count in owned(part))

        rest = total(())
        once = {id(layer): total((layer,)) - rest for layer in {id(layer): layer for layer in self.layers}.values()}
        return rest + sum(once[id(layer)] for layer in self.layers)

    def kv_nbytes(self, tokens: int, prompt: int | None = None) -> int:
        """Bytes the cache of one sequence holds after `tokens` tokens, recurrent states included.

        Args:
            tokens: seen so far.
            prompt: how many of them came before the first answer; None = all.
        """
        return sum(layer.cache.nbytes(tokens, prompt).held for layer in self.layers)

    def state_nbytes(self) -> int:
        """Of these the bytes that do not depend on tokens: the states of recurrent layers."""
        return sum(layer.cache.state_bytes for layer in self.layers)

    def with_dtype(self, dtype: str, kv_dtype: str | None = None, *, keep_packed: bool = True) -> ModelSpec:
        """Return the model with float weights and activations in `dtype` and the cache in `kv_dtype`.

        Args:
            dtype: ``float32 | bfloat16 | float16``; ``fp8``: activations, norms, embeddings, routers and the head in bf16, every
                other matrix in fp8 with its input coded as fp8; ``mxfp4``: the same with mxfp4 matrices and inputs left in
                bf16, and where the model has experts, in them alone (gpt-oss).
            kv_dtype: a floating dtype, ``fp8``, ``int8`` or ``int4`` (``int4-g32``: groups of 32); None = as the activations.
            keep_packed: leave matrices that are not plain floats as they are (True) or store them as `dtype` too.

        Raises:
            SpecError: a dtype of another name, or rows that do not divide into blocks.
        """
        name = weights_name(dtype)
        weights = float_format("bf16" if name in SCALED_KINDS else name)
        page = page_format(kv_dtype or weights.kind)

        def change(node: Node) -> dict[str, object]:
            updates: dict[str, object] = {}
            for field in dataclasses.fields(node):  # type: ignore[arg-type]
                value = getattr(node, field.name)
                if isinstance(value, WeightFormat) and (value.is_float or not keep_packed):
                    updates[field.name] = weights
                    if isinstance(node, LinearSpec) and field.name == "format":
                        updates |= {"act": "none", "product": EXACT}
                elif isinstance(value, PageFormat):
                    updates[field.name] = page
            return updates

        converted = tree.mapped(self, change)
        converted = dataclasses.replace(converted, act_dtype=weights.kind)
        return converted._coded(name) if name in SCALED_KINDS else converted

    def with_kv_dtype(self, kv_dtype: str) -> ModelSpec:
        """Return the model with its cache in another format, see `page_format`; nothing else changes.

        Raises:
            SpecError: a dtype of another name.
        """
        formats: dict[str, object] = dict.fromkeys(("k_format", "v_format"), page_format(kv_dtype))
        return tree.mapped(self, lambda node: formats if isinstance(node, HeadSpec) else {})

    def _coded(self, kind: str) -> ModelSpec:
        """The matrices that checkpoints in fp8 or mxfp4 hold so, as `with_dtype` says."""
        experts_only = kind == "mxfp4" and any(isinstance(layer.mlp, MoESpec) for layer in self.layers)
        values = {"format": WeightFormat(kind=kind), "act": "fp8" if kind == "fp8" else "none"}

        def coded(layer: LayerSpec) -> LayerSpec:
            one = dataclasses.replace(self, layers=(layer,))
            edits = [
                Edit(path, field, value)
                for path, node in one.linears()
                if node.format.is_float and path.rpartition(".")[2] not in ("lm_head", "router", "shared_gate")
                if not experts_only or ".experts." in path
                for field, value in values.items()
            ]
            return tree.edit(one, edits, kind, ())[0].layers[0]  # type: ignore[attr-defined]

        done = {id(layer): coded(layer) for layer in {id(layer): layer for layer in self.layers}.values()}
        return dataclasses.replace(self, layers=tuple(done[id(layer)] for layer in self.layers))


def weight_nbytes(node: Node) -> int:
    """Resident weight bytes of one node, its children excluded."""
    if isinstance(node, LinearSpec | EmbeddingSpec | NormSpec | ConvSpec):
        return node.nbytes()
    if isinstance(node, StateSpaceSpec | LinearAttentionSpec):
        return node.out_proj.bias_format.nbytes(1, node.num_parameters())
    if isinstance(node, AttentionSpec):
        sinks = node.num_attention_heads * node.q_proj.bias_format.nbytes(1, 1) if node.sinks else 0
        return sinks + node.key_order_nbytes
    if isinstance(node, MoESpec):
        bias = node.num_experts * ITEM_BYTES["fp32"] if node.correction_bias else 0
        return bias + (node.router.bias_format.nbytes(1, node.num_experts) if node.expert_scale else 0)
    if isinstance(node, FFNSpec) and isinstance(node.executor, GateFirst):
        return ITEM_BYTES["fp32"]  # the threshold
    return 0


def owned(spec: ModelSpec) -> Iterator[tuple[str, Node, int]]:
    """Yield (path, node, count) of every node that owns weights; what is tied owns none, experts count num_experts."""

    def below(node: Node, path: str, count: int) -> Iterator[tuple[str, Node, int]]:
        for name, child in tree.children(node):
            here = f"{path}.{name}" if path else name
            if here == "lm_head" and spec.tie_word_embeddings:
                continue
            if name == "v_proj" and isinstance(node, AttentionSpec) and node.tied_values:
                continue
            held = node.num_experts // node.ranks if isinstance(node, MoESpec) and name == "experts" else 1
            times = count * held
            yield here, child, times
            yield from below(child, here, times)

    yield from below(spec, "", 1)


@functools.lru_cache(maxsize=64)
def _hash(spec: ModelSpec) -> str:
    seen: dict[int, object] = {}

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if id(value) not in seen:
                fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
                seen[id(value)] = {"type": type(value).__name__, **fields}
            return seen[id(value)]
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return hashlib.sha256(json.dumps(plain(spec), sort_keys=True).encode()).hexdigest()
