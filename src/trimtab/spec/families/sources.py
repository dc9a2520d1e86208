"""Which tensor of a file holds which weight of a model, and what the tensors add to its spec.

A path's weight may be a whole tensor, some rows of a fused one (Phi-3 ``qkv_proj``), rows in another order (GGUF keeps the
rotary pairs of Llama side by side) or a transposed one (GPT-2). `Source` says which, and the loader needs to know no family.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.spec import tree
from trimtab.spec.families.names import Spelling
from trimtab.spec.formats import FILE_FORMATS, FLOAT_KINDS, GGUF_BLOCKS, WeightFormat
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, MoESpec


@dataclass(frozen=True, slots=True)
class Source:
    """Where one weight comes from.

    Args:
        tensor: name in the file.
        block: stored rows that belong to this weight at all (one expert of a stack); None = all.
        transposed: the block holds the transpose.
        rows: then, the rows taken, in this order; None = all.
        shift: then, what is added to every value.
    """

    tensor: str
    block: range | None = None
    transposed: bool = False
    rows: Sequence[int] | None = None
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Want:
    """One weight a spec asks for: its key, the spec's node, and whether it is a bias or another vector.

    Args:
        key: key in `Weights`.
        path: node path less the layer prefix (``self_attn.q_proj``), or the top-level path.
        layer: index, or None above the layers.
        expert: index, or None.
        part: ``weight``, ``bias``, ``sinks`` or ``correction_bias``.
        shape: (rows, columns) of the untransposed weight; a vector is (1, n).
    """

    key: str
    path: str
    node: tree.Node
    layer: int | None
    expert: int | None
    part: str
    shape: tuple[int, int]

    @property
    def vector(self) -> bool:
        """True for biases, norms and the like."""
        return self.part != "weight" or isinstance(self.node, NormSpec)


def wanted(spec: ModelSpec) -> Iterator[Want]:
    """Yield every weight of a spec once; a tied head is none, experts come one by one."""
    moes = {path: node for path, node in tree.walk(spec) if isinstance(node, MoESpec)}
    for path, node in tree.walk(spec):
        if path == "lm_head" and spec.tie_word_embeddings:
            continue
        layer, local = _split(path)
        if isinstance(node, AttentionSpec) and node.sinks:
            yield Want(f"{path}.sinks", local, node, layer, None, "sinks", (1, node.num_attention_heads))
        if isinstance(node, MoESpec) and node.correction_bias:
            yield Want(f"{path}.correction_bias", local, node, layer, None, "correction_bias", (1, node.num_experts))
        if not isinstance(node, LinearSpec | EmbeddingSpec | NormSpec):
            continue
        shape = (1, node.size) if isinstance(node, NormSpec) else (node.n, node.k)
        bias = not isinstance(node, EmbeddingSpec) and node.bias
        before, inside, after = path.partition(".experts.")
        for expert in range(moes[before].num_experts) if inside else (None,):
            key = f"{before}.experts.{expert}.{after}" if inside else path
            yield Want(key, local, node, layer, expert, "weight", shape)
            if bias:
                yield Want(
                    f"{key}.bias",
                    local,
                    node,
                    layer,
                    expert,
                    "bias",
                    (1, shape[1] if isinstance(node, NormSpec) else shape[0]),
                )


def _split(path: str) -> tuple[int | None, str]:
    if not path.startswith("layers."):
        return None, path
    _, index, local = path.split(".", 2) if path.count(".") > 1 else (*path.split("."), "")
    return int(index), local


def sources(spec: ModelSpec, tensors: Collection[str], spelling: Spelling, where: str) -> dict[str, Source]:
    """Find every weight of `spec` among the tensors of a file.

    Args:
        spec: the model.
        tensors: names in the file.
        spelling: of the file.
        where: the file or folder, for the message.

    Returns:
        Key in `Weights` -> Source.

    Raises:
        SpecError: weights are missing; the first of them are named.
    """
    probe = spelling.names.get("embed_tokens", "embed_tokens")
    prefix = next((p for p in spelling.prefixes if f"{p}{probe}.weight" in tensors), spelling.prefixes[0])
    found, missing = {}, []
    for want in wanted(spec):
        options = list(_candidates(spec, want, spelling, prefix))
        source = next((option for option in options if option.tensor in tensors), None)
        if source is None:
            missing.append(options[0].tensor)
        else:
            found[want.key] = source
    if missing:
        listed = ", ".join(missing[:5]) + (f", ... ({len(missing)} in all)" if len(missing) > 5 else "")
        raise SpecError(f"{where} lacks weights of {spec.name} ({spec.family}): {listed}. Fetch the files again.")
    return found


def places(spec: ModelSpec, spelling: Spelling, *, gguf: bool) -> dict[str, Source]:
    """Where a file that is written anew keeps every weight: key in `Weights` -> Source.

    Args:
        spec: the model.
        spelling: of the file.
        gguf: experts are stacked, and every name has an ending; else as the hub has them.
    """
    found = {}
    for want in wanted(spec):
        options = list(_candidates(spec, want, spelling, spelling.prefixes[0]))
        chosen = 0
        if want.path == "lm_head" or (gguf and want.expert is not None):
            chosen = -1
        elif gguf and want.part in ("sinks", "correction_bias"):
            chosen = 1 if want.part == "sinks" else 2
        found[want.key] = options[chosen]
    return found


def with_stored_biases(spec: ModelSpec, tensors: Collection[str], spelling: Spelling) -> ModelSpec:
    """Return `spec` with a bias on every linear that has one in the file: GGUF metadata do not say."""
    edits = []
    for path, node in tree.walk(spec):
        if isinstance(node, LinearSpec) and not (path == "lm_head" and spec.tie_word_embeddings):
            layer, local = _split(path)
            expert = 0 if ".experts." in path else None
            want = Want(f"{path}.bias", local, node, layer, expert, "bias", (1, node.n))
            bias = any(source.tensor in tensors for source in _candidates(spec, want, spelling, spelling.prefixes[0]))
            if bias != node.bias:
                edits.append(tree.Edit(path, "bias", bias))
    return tree.edit(spec, edits, "file", ())[0]


def with_stored_formats(
    spec: ModelSpec, found: Mapping[str, Source], kinds: Mapping[str, str | WeightFormat], where: str
) -> ModelSpec:
    """Return `spec` with every matrix, bias and norm in the format its tensor has.

    Args:
        spec: the model.
        found: from `sources`.
        kinds: format of every tensor of the file, or its name.
        where: the file or folder, for the message.

    Raises:
        UnsupportedModelError: a weight type Trimtab does not read.
    """
    formats: dict[tuple[str, str], str | WeightFormat] = {}
    for want in wanted(spec):
        if want.expert not in (None, 0) or want.part not in ("weight", "bias"):
            continue
        path = want.path if want.layer is None else f"layers.{want.layer}.{want.path}"
        if want.part == "bias" and not isinstance(want.node, LinearSpec):
            continue  # a norm has one format for both; its weight's
        formats[path, "bias_format" if want.part == "bias" else "format"] = kinds[found[want.key].tensor]
    if spec.tie_word_embeddings:
        formats["lm_head", "format"] = formats["embed_tokens", "format"]
    nodes, edits = dict(tree.walk(spec)), []
    for (path, name), kind in formats.items():
        if isinstance(kind, str):
            if kind not in FLOAT_KINDS and kind not in GGUF_BLOCKS and kind not in FILE_FORMATS:
                known = ", ".join((*FLOAT_KINDS, *GGUF_BLOCKS, *FILE_FORMATS))
                raise UnsupportedModelError(
                    f"{where}: {path} is stored as {kind}, which is not read. Known: {known}. Convert the file."
                )
            kind = FILE_FORMATS.get(kind) or WeightFormat(kind=kind)
        if getattr(nodes[path], name) != kind:
            edits.append(tree.Edit(path, name, kind))
    edited, _ = tree.edit(spec, edits, "file", ())
    return edited


def _candidates(spec: ModelSpec, want: Want, spelling: Spelling, prefix: str) -> Iterator[Source]:
    """The tensors that may hold `want`, the likeliest first."""
    base = prefix if want.layer is None else f"{prefix}{spelling.layers}.{want.layer}."
    ending = "bias" if want.part == "bias" else "weight"
    shift = spelling.norm_shift if isinstance(want.node, NormSpec) and want.part == "weight" else 0.0
    if want.expert is not None:
        yield from _expert_candidates(want, spelling, base, ending)
        return
    if want.part in ("sinks", "correction_bias"):
        name = spelling.names.get(f"{want.path}.{want.part}", f"{want.path}.{want.part}")
        yield Source(base + name)
        for ending in ("weight", "bias"):
            yield Source(f"{base}{name}.{ending}")
        return
    name = spelling.names.get(want.path, want.path)
    rows = None
    if spelling.swapped and want.path in ("self_attn.q_proj", "self_attn.k_proj"):
        attention = _attention(spec, want)
        heads = attention.num_attention_heads if want.path.endswith("q_proj") else attention.num_key_value_heads
        rows = unpaired(heads, attention.head_dim)
    if want.path not in spelling.fused or want.path in spelling.names:
        for start in (base, "") if want.path == "lm_head" else (base,):
            yield Source(
                f"{start}{name}.{ending}", None, name in spelling.transposed and ending == "weight", rows, shift
            )
    if want.path in spelling.fused:
        tensor, place = spelling.fused[want.path]
        yield Source(
            f"{base}{tensor}.{ending}",
            None,
            tensor in spelling.transposed and ending == "weight",
            _place(spec, want, place),
        )


def _expert_candidates(want: Want, spelling: Spelling, base: str, ending: str) -> Iterator[Source]:
    assert want.expert is not None
    projection = want.path.rpartition(".")[2]
    if projection in spelling.experts:
        yield Source(f"{base}{spelling.experts[projection].format(e=want.expert)}.{ending}")
    if projection not in spelling.stacked:
        return
    tensor, place = spelling.stacked[projection]
    bias = ending == "bias"
    transposed = tensor in spelling.transposed and not bias
    node = want.node
    assert isinstance(node, LinearSpec)
    fused = 2 * node.n if place else node.n
    stored = 1 if bias else node.k if transposed else fused  # rows one expert takes in the stack
    rows = {
        "": None,
        "gate": range(node.n),
        "up": range(node.n, 2 * node.n),
        "even": range(0, fused, 2),
        "odd": range(1, fused, 2),
    }[place]
    yield Source(
        f"{base}{tensor}{spelling.stack_suffix[bias]}",
        range(want.expert * stored, (want.expert + 1) * stored),
        transposed,
        rows,
    )


def _attention(spec: ModelSpec, want: Want) -> AttentionSpec:
    assert want.layer is not None
    attention = spec.layers[want.layer].self_attn
    assert isinstance(attention, AttentionSpec)
    return attention


def _place(spec: ModelSpec, want: Want, place: str) -> Sequence[int]:
    """Rows of a fused tensor."""
    if place in ("gate", "up"):
        width = want.shape[1] if want.vector else want.shape[0]
        return range(width) if place == "gate" else range(width, 2 * width)
    attention = _attention(spec, want)
    sizes = [linear.n for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    which = "qkv".index(place[0])
    if place.endswith("/h"):
        return interleaved(attention.num_attention_heads, attention.head_dim, which)
    start = sum(sizes[:which])
    return range(start, start + sizes[which])


@functools.lru_cache(maxsize=64)
def unpaired(heads: int, head_dim: int) -> tuple[int, ...]:
    """Stored row of every row in Hugging Face order, for a file that keeps the two halves of a rotary pair side by side.

    >>> unpaired(1, 4)
    (0, 2, 1, 3)
    """
    half = head_dim // 2
    return tuple(head * head_dim + 2 * j + i for head in range(heads) for i in range(2) for j in range(half))


@functools.lru_cache(maxsize=64)
def interleaved(heads: int, head_dim: int, which: int) -> tuple[int, ...]:
    """Rows of q (0), k (1) or v (2) where every head stores its three parts one after the other.

    >>> interleaved(2, 1, 1)
    (1, 4)
    """
    return tuple((3 * head + which) * head_dim + j for head in range(heads) for j in range(head_dim))
