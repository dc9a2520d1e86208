"""From a spec and its weights to a program: which ops become one kernel, and which buffers they are bound to.

Legend: T tokens, D hidden size, N query heads, G KV heads, H head size, F neurons, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable

import numpy as np

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime import kernels
from trimtab.runtime.cache.rows import head_forms
from trimtab.runtime.kernels import _core
from trimtab.runtime.kernels.binary import binary_matrix, rotation
from trimtab.runtime.native.arena import Arena
from trimtab.runtime.native.attention import unified_limits
from trimtab.runtime.native.dataflow import ONLY, thresholds
from trimtab.runtime.native.int8 import int8_matrix, int8_name, missing_int8, one_input
from trimtab.runtime.native.products import as_tiles, core_tiles, tiles_of
from trimtab.runtime.native.program import NativeProgram
from trimtab.runtime.numerics import decode
from trimtab.runtime.rope import frequencies
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec import tree
from trimtab.spec.bcq import BcqFormat
from trimtab.spec.formats import FP32, WeightFormat
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import NO_FLOW, AttentionSpec, FFNSpec, GateFirst, LayerSpec
from trimtab.spec.product import EXACT, Int8Vector, Lmul, LookupTable, Product, Rounded
from trimtab.spec.tree import Node

#: Hugging Face names of activations -> index in `Act` of `cpp/kernels.h`.
ACTS = {
    "silu": 0, "swish": 0, "gelu_tanh": 1, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3,
}  # fmt: skip
_NONE = 4
#: Formats whose single rows a kernel can read.
_ROW_KINDS = ("fp32", "bf16", "int")
_CODINGS = {"fp32": 0, "fp16": 1, "bf16": 2}
_SET, _ADD, _GATED = 0, 1, 2


def lowered_spec(spec: ModelSpec) -> ModelSpec:
    """The model as the native program holds it: matrices in tiles, norms and biases in fp32, activations in fp32.

    Raises:
        UnsupportedModelError: names the first node that has no native kernel.
    """
    for path, node in tree.walk(spec):
        missing = _missing(path, node)
        if missing:
            raise UnsupportedModelError(f"{missing} ({path}) has no native kernel.")
    if spec.flow != NO_FLOW:
        raise UnsupportedModelError("A token filter before the prompt has no native kernel.")
    if spec.norm is None or spec.embed_norm is not None:
        raise UnsupportedModelError(
            "A model without a last norm, or with one after the embedding, has no native kernel."
        )
    if len(_splits(spec)) > 1:
        raise UnsupportedModelError(
            "A model whose layers cut their keys into pieces of different lengths has no native kernel."
        )
    return dataclasses.replace(tree.mapped(spec, _held), act_dtype="fp32")


def _held(node: Node) -> dict[str, object]:
    """What differs where the native program holds a node."""
    if isinstance(node, FFNSpec) and isinstance(node.executor, GateFirst):  # rows that may be skipped stay rows
        return {"up_proj": node.up_proj, "down_proj": node.down_proj}
    if isinstance(node, LinearSpec):
        return {"format": _tiled(node), "bias_format": FP32}
    if isinstance(node, EmbeddingSpec):
        return {"format": _tiled(node)}
    return {"format": FP32} if isinstance(node, NormSpec) else {}


def _tiled(node: LinearSpec | EmbeddingSpec) -> WeightFormat:
    """The tiled format a matrix is held in."""
    try:
        return tiles_of(node.format, node.product if isinstance(node, LinearSpec) else EXACT, node.n, node.k)
    except SpecError as error:
        raise UnsupportedModelError(str(error)) from None


def _missing(path: str, node: Node) -> str:
    """What of a node has no native kernel; empty = it has."""
    if isinstance(node, LayerSpec):
        if not isinstance(node.self_attn, AttentionSpec):
            return f"A {type(node.self_attn).__name__} layer"
        if not isinstance(node.mlp, FFNSpec):
            return "A mixture of experts"
        if node.parallel or node.ranks > 1 or node.input_layernorm is None or node.post_attention_layernorm is None:
            return "A layer whose blocks run side by side"
    for product in _products(node):
        if isinstance(product, Lmul | Rounded):
            return f"A product of {'bits added (L-Mul)' if isinstance(product, Lmul) else 'rounded floats'}"
    if isinstance(node, AttentionSpec):
        return _missing_attention(node)
    if isinstance(node, FFNSpec):
        if node.act not in ACTS:
            return f"The activation {node.act}"
        if isinstance(node.executor, GateFirst):
            return _missing_gate_first(node)
    if isinstance(node, LinearSpec):
        if node.layout != "row":
            return "" if path.endswith(".mlp.down_proj") else "A matrix stored transposed"
        if isinstance(node.product, Int8Vector):
            return missing_int8(node.product)
        if node.act != "none":
            return f"A product with its input coded as {node.act}"
        if isinstance(node.product, LookupTable):
            return ""  # refused in words of its own
        if node.product != EXACT:
            return f"A product by {type(node.product).__name__}"
        try:
            tiles_of(node.format, node.product, node.n, node.k)
        except SpecError:
            return f"A matrix in {node.format} with rows of {node.k}"
    if isinstance(node, NormSpec) and not node.weight:
        return "A norm without weights"
    return ""


def _products(node: Node) -> tuple[Product, ...]:
    """How a node multiplies."""
    rope = node.rope if isinstance(node, AttentionSpec) else None
    own = node.product if isinstance(node, LinearSpec | NormSpec | FFNSpec | AttentionSpec) else EXACT
    return (own, EXACT if rope is None else rope.product)


def _missing_gate_first(node: FFNSpec) -> str:
    gate, up, down = node.gate_proj, node.up_proj, node.down_proj
    if gate is None or gate.bias or up.bias or down.bias:
        return "A feed-forward block with biases that skips rows"
    if down.layout != "transposed" or any(linear.format.kind not in _ROW_KINDS for linear in (up, down)):
        return f"Skipping rows of matrices in {up.format} and {down.format} ({down.layout})"
    return ""


def _splits(spec: ModelSpec) -> set[int | None]:
    return {layer.self_attn.split for layer in spec.layers if isinstance(layer.self_attn, AttentionSpec)}


def _missing_attention(node: AttentionSpec) -> str:
    heads = node.cache.heads
    if node.alibi or node.sinks or node.gated or node.tied_values or node.v_norm is not None or node.chunk is not None:
        return "Attention with ALiBi, sinks, gates, tied values, a norm of values or chunks"
    if node.key_order != "model":
        return "Attention over keys in another order of channels"
    if node.head_dim % 16 or node.head_dim > 512 or any(head.v_head_dim != node.head_dim for head in heads):
        return f"A head of {node.head_dim} elements, not a multiple of 16 up to 512,"
    for norm in (node.q_norm, node.k_norm):
        if norm is not None and norm.size != node.head_dim:
            return "A norm over all heads together"
    return ""


class SharedTiles:
    """Matrices in tiles that programs of one base model have in common.

    A matrix is shared where its path, format and product are the same and its stored form is the same object.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, WeightFormat, Product], tuple[Packed, _core.Tiles, object]] = {}

    def find(
        self, path: str, packed: Packed, format: WeightFormat, product: Product
    ) -> tuple[_core.Tiles, object] | None:
        """The tiles of a matrix and what owns their memory."""
        stored, tiles, owner = self.held.get((path, format, product), (None, None, None))
        return (tiles, owner) if stored is packed and tiles is not None else None


def lower(
    spec: ModelSpec,
    weights: Weights,
    threads: int = 0,
    release: Callable[[str], None] | None = None,
    shared: SharedTiles | None = None,
) -> NativeProgram:
    """Build the program of a model.

    Args:
        spec: the model; matrices in any format that has tiles.
        weights: of `spec`. Every matrix is copied into tiles, so the caller may drop them afterwards.
        threads: workers, the caller's thread among them; 0 = as many as this process may run on.
        release: called with the path of every weight that was copied, so that its pages can be given back.
        shared: matrices of other programs to use, and where those of this one are noted; the caller keeps the weights then.

    Raises:
        UnsupportedModelError: something has no native kernel.
        CapacityError: the weights do not fit into memory.
    """
    native = lowered_spec(spec)
    asked = (node.product.threads for _, node in native.linears() if isinstance(node.product, LookupTable))
    count = threads or max(asked, default=0) or len(os.sched_getaffinity(0))
    builder = _Builder(native, weights, count, release or (lambda path: None), shared or SharedTiles())
    return builder.build()


class _Builder:
    """Adds kernels in the order of the graph."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, threads: int, release: Callable[[str], None], shared: SharedTiles
    ) -> None:
        self.spec, self.weights, self.release, self.shared = spec, weights, release, shared
        self.program = _core.Program(threads)
        self.program.split(next(iter(_splits(spec)), None) or 0)
        self.arena = Arena(sum(f.nbytes(*shape) for path, f, shape in _matrices(spec) if self.theirs(path, f) is None))
        self.ropes: dict[object, int] = {}
        self.kept: list[object] = []  # what the program reads, beside its arena
        self.coded: dict[str, tuple[str, ...]] = {}  # kernel that multiplies int8 inputs -> its matrices
        self.nbytes = 0

    def build(self) -> NativeProgram:
        spec, program = self.spec, self.program
        widest = max(spec.hidden_size, 1)
        h = program.values(widest, False)
        shapes = [layer.self_attn for layer in spec.layers if isinstance(layer.self_attn, AttentionSpec)]
        qkv = program.values(
            max((a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim for a in shapes), False
        )
        attended = program.values(max(a.num_attention_heads * a.head_dim for a in shapes), False)
        hidden = program.values(
            max(layer.mlp.intermediate_size for layer in spec.layers if isinstance(layer.mlp, FFNSpec)), False
        )
        side = -1
        if any(layer.attn_output_norm or layer.mlp_output_norm for layer in spec.layers):
            side = program.values(widest, False)
        logits = program.values(spec.vocab_size, True)
        table = self.table("embed_tokens", spec.embed_tokens)
        program.embed("embed_tokens", table, spec.embed_tokens.scale, h)
        if spec.embed_positions is not None:
            at = spec.embed_positions
            program.positions("embed_positions", self.table("embed_positions", at), at.offset, h)
        for index, layer in enumerate(spec.layers):
            self.layer(index, layer, h, qkv, attended, hidden, side)
        head = spec.lm_head
        tied = spec.tie_word_embeddings
        product = self.product("lm_head", head, logits, 0, table if tied else None)
        product = (*product[:4], spec.logit_scale, spec.logit_softcap or 0.0, *product[6:])
        assert spec.norm is not None
        name = "norm+lm_head" + ("+logit_softcap" if spec.logit_softcap else "")
        self.linear(name, h, self.norm("norm", spec.norm), {"lm_head": (head, product)}, _SET, _NONE)
        return NativeProgram(spec, program, self.arena, logits, self.nbytes, self.kept, self.coded)

    def layer(self, index: int, layer: LayerSpec, h: int, qkv: int, attended: int, hidden: int, side: int) -> None:
        program, path = self.program, f"layers.{index}"
        attn, mlp = layer.self_attn, layer.mlp
        assert isinstance(attn, AttentionSpec) and isinstance(mlp, FFNSpec)
        at = f"{path}.self_attn"
        parts, column = {}, 0
        for name, node in (("q_proj", attn.q_proj), ("k_proj", attn.k_proj), ("v_proj", attn.v_proj)):
            parts[f"{at}.{name}"] = (node, self.product(f"{at}.{name}", node, qkv, column))
            column += node.n
        norm = self.norm(f"{path}.input_layernorm", layer.input_layernorm)
        self.linear(f"{path}.input_layernorm+q_proj+k_proj+v_proj", h, norm, parts, _SET, _NONE)
        program.attend_heads(
            self.attend_name(at, attn), index, qkv, attended, self.rope(attn), attn.num_attention_heads,
            attn.num_key_value_heads, attn.head_dim, attn.window or 0, [head_forms(head) for head in attn.cache.heads],
            self.norm(f"{at}.q_norm", attn.q_norm), self.norm(f"{at}.k_norm", attn.k_norm), attn.scale, attn.softcap or 0.0,
            unified_limits(attn), True, (0, 0) if attn.prefill is None else (attn.prefill.sink, attn.prefill.local),
        )  # fmt: skip
        self.back(f"{at}.o_proj", attn.o_proj, attended, h, side, f"{path}.attn_output_norm", layer.attn_output_norm)
        norm = self.norm(f"{path}.post_attention_layernorm", layer.post_attention_layernorm)
        if isinstance(mlp.executor, GateFirst):
            self.gate_first(path, mlp, mlp.executor, h, norm, side, layer.mlp_output_norm)
            return
        at, up = f"{path}.mlp", (mlp.up_proj, self.product(f"{path}.mlp.up_proj", mlp.up_proj, hidden, 0))
        if mlp.gate_proj is None:
            name = f"{path}.post_attention_layernorm+up_proj+act"
            self.linear(name, h, norm, {f"{at}.up_proj": up}, _SET, ACTS[mlp.act])
        else:
            gate = (mlp.gate_proj, self.product(f"{at}.gate_proj", mlp.gate_proj, hidden, 0))
            name = f"{path}.post_attention_layernorm+gate_proj+up_proj+act"
            self.linear(name, h, norm, {f"{at}.gate_proj": gate, f"{at}.up_proj": up}, _GATED, ACTS[mlp.act])
        self.back(
            f"{path}.mlp.down_proj", mlp.down_proj, hidden, h, side, f"{path}.mlp_output_norm", layer.mlp_output_norm
        )

    @staticmethod
    def attend_name(at: str, attn: AttentionSpec) -> str:
        parts = ["q_norm"] * (attn.q_norm is not None) + ["k_norm"] * (attn.k_norm is not None)
        return f"{at}." + "+".join([*parts, *(["rope"] if attn.rope else []), "append", "attend"])

    def gate_first(
        self,
        path: str,
        mlp: FFNSpec,
        how: GateFirst,
        h: int,
        norm: _core.Norm | None,
        side: int,
        after: NormSpec | None,
    ) -> None:
        if after is not None:
            raise UnsupportedModelError(
                f"A norm behind a feed-forward block that skips rows ({path}.mlp) has no native kernel."
            )
        assert norm is not None and mlp.gate_proj is not None
        threshold = float(decode(self.weights[f"{path}.mlp.threshold"]).reshape(-1)[0])
        self.nbytes += 4
        self.program.gate_first(
            f"{path}.post_attention_layernorm+gate_proj+act+up_proj+down_proj+add_mlp", h, h, norm,
            self.matrix(f"{path}.mlp.gate_proj", mlp.gate_proj), self.rows(f"{path}.mlp.up_proj", mlp.up_proj),
            self.rows(f"{path}.mlp.down_proj", mlp.down_proj), ACTS[mlp.act], threshold, how.max_tokens, how.threshold_prefill,
        )  # fmt: skip

    def rows(self, path: str, node: LinearSpec) -> _core.Rows:
        """The stored rows of a matrix, copied into the arena."""
        packed = self.weights[path]
        buffers = self.arena.buffers(node.format, node.stored_shape)
        for name, buffer in packed.buffers.items():
            np.copyto(buffers[name], buffer)
        self.release(path)
        self.nbytes += packed.nbytes
        return kernels.row_matrix(Packed(packed.format, packed.shape, buffers, packed.layout))

    def back(
        self, path: str, node: LinearSpec, source: int, h: int, side: int, norm_path: str, norm: NormSpec | None
    ) -> None:
        """The projection back to the residual stream; an output norm stands between the two."""
        add = "add_attn" if path.endswith("o_proj") else "add_mlp"
        if norm is None:
            self.linear(f"{path}+{add}", source, None, {path: (node, self.product(path, node, h, 0))}, _ADD, _NONE)
            return
        self.linear(path, source, None, {path: (node, self.product(path, node, side, 0))}, _SET, _NONE)
        made = self.norm(norm_path, norm)
        assert made is not None
        self.program.norm_add(f"{norm_path}+{add}", side, made, h)

    def linear(
        self,
        name: str,
        source: int,
        norm: _core.Norm | None,
        parts: dict[str, tuple[LinearSpec, tuple]],
        store: int,
        act: int,
    ) -> None:
        """Products of one input: paths -> nodes, and what `product` made of each."""
        made = [product for _, product in parts.values()]
        forms = {path: node.format for path, (node, _) in parts.items() if isinstance(node.format, BcqFormat)}
        if forms:
            rotated = {form.rotated for form in forms.values()}
            if len(forms) < len(parts) or len(rotated) > 1:
                raise UnsupportedModelError(
                    f"Binary-coded matrices and others, or rotated and plain ones, that share an input ({', '.join(parts)}) have no "
                    "native kernel."
                )
            first = next(iter(forms))
            turn = rotation(forms[first], parts[first][0].k)
            self.program.binary_linear(name, source, norm, turn, [each[:6] for each in made], store, act)
            return
        how = one_input({path: node for path, (node, _) in parts.items()})
        if how is None:
            self.program.linear(name, source, norm, made, store, act)
            return
        name = int8_name(name, {path.rpartition(".")[2] for path in parts}, how)
        columns = None if how.columns is None else list(how.columns)
        self.program.int8_linear(name, source, norm, [each[:6] for each in made], how.threshold, columns, store, act)
        self.coded[name] = tuple(parts) if how.decomposes else ()

    def product(self, path: str, node: LinearSpec, values: int, column: int, tied: _core.Tiles | None = None) -> tuple:
        """A matrix, or the embedding it is tied to, and where its product goes."""
        to = (values, column, self.bias(path, node), 1.0, 0.0)
        if isinstance(node.product, Int8Vector):
            return (self.int8(path, node), *to)
        if isinstance(node.format, BcqFormat):
            return (self.binary(path, node), *to)
        flow = self.flow(node, self.spec.embed_tokens.format if tied else node.format)
        return (tied or self.matrix(path, node), *to, *flow)

    def flow(self, node: LinearSpec, format: WeightFormat) -> tuple[int, int]:
        """Tokens from which the flat kernel, and from which the decoding one, multiplies this matrix."""
        if len(node.kernels) == 1:
            return ONLY[node.kernels[0]]
        return thresholds(node.n, node.k, format, node.kernels, self.program.threads)

    def int8(self, path: str, node: LinearSpec) -> _core.Int8Rows:
        """Rows in int8, copied into the arena, and what outliers are multiplied by."""
        held, copied = int8_matrix(path, node, self.weights, self.arena.buffers(node.format, node.stored_shape))
        self.release(path)
        self.nbytes += copied
        return held

    def binary(self, path: str, node: LinearSpec) -> _core.Binary:
        """A binary-coded matrix, copied into the arena."""
        packed = as_tiles(self.weights[path], node.format, self.arena.buffers(node.format, (node.n, node.k)))
        self.release(path)
        self.nbytes += packed.nbytes
        return binary_matrix(packed)

    def matrix(self, path: str, node: LinearSpec) -> _core.Tiles:
        return self._tiles(path, node.format, (node.n, node.k), node.product)

    def table(self, path: str, node: EmbeddingSpec) -> _core.Tiles:
        return self._tiles(path, node.format, (node.n, node.k))

    def _tiles(self, path: str, format: WeightFormat, shape: tuple[int, int], product: Product = EXACT) -> _core.Tiles:
        if (found := self.theirs(path, format, product)) is not None:
            self.kept.append(found[1])
            return found[0]
        packed = as_tiles(self.weights[path], format, self.arena.buffers(format, shape))
        self.release(path)
        self.nbytes += packed.nbytes
        tiles = core_tiles(packed, product)
        self.shared.held[path, format, product] = self.weights[path], tiles, self.arena
        return tiles

    def theirs(
        self, path: str, format: WeightFormat, product: Product | None = None
    ) -> tuple[_core.Tiles, object] | None:
        """A matrix that another program of this base holds already; `product` by default that of the node."""
        if not self.shared.held or path not in self.weights:
            return None
        if product is None:
            node = self.spec.node(path)
            product = node.product if isinstance(node, LinearSpec) else EXACT
        return self.shared.find(path, self.weights[path], format, product)

    def bias(self, path: str, node: LinearSpec) -> np.ndarray | None:
        return self.vector(f"{path}.bias") if node.bias else None

    def vector(self, path: str) -> np.ndarray:
        made = np.array(decode(self.weights[path]).reshape(-1), dtype=np.float32)
        self.nbytes += made.nbytes
        self.kept.append(made)
        return made

    def norm(self, path: str, node: NormSpec | None) -> _core.Norm | None:
        if node is None:
            return None
        weight = self.vector(path)
        if node.unit_offset:
            weight += np.float32(1.0)
        bias = self.vector(f"{path}.bias") if node.bias else None
        return self.program.norm(node.kind == "layer", node.eps, node.size, weight, bias)

    def rope(self, attn: AttentionSpec) -> int:
        if attn.rope is None:
            return -1
        if attn.rope not in self.ropes:
            found = frequencies(attn.rope, self.spec.max_position_embeddings)
            longer = [] if found.long is None else found.long.tolist()
            self.ropes[attn.rope] = self.program.rope(found.inverse.tolist(), longer, found.original, found.scale)
        return self.ropes[attn.rope]


def _matrices(spec: ModelSpec) -> Iterable[tuple[str, WeightFormat, tuple[int, int]]]:
    """(path, format, shape) of every matrix the program owns, in the order of the walk."""
    for path, node in tree.walk(spec):
        if isinstance(node, EmbeddingSpec) or (
            isinstance(node, LinearSpec) and not (path == "lm_head" and spec.tie_word_embeddings)
        ):
            yield path, node.format, node.stored_shape if isinstance(node, LinearSpec) else (node.n, node.k)
