"""The parts every family is put together from, in one weight format and one cache format."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.spec.cache import CacheSpec, HeadSpec, PageFormat, StateSpec
from trimtab.spec.families.facts import Facts
from trimtab.spec.formats import WeightFormat
from trimtab.spec.leaves import ConvSpec, EmbeddingSpec, LinearSpec, NormSpec, RopeSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LayerSpec, Mixer, MoESpec


@dataclass(frozen=True, slots=True)
class Parts:
    """Makes nodes whose weights have `format` and whose cached keys and values have its kind.

    Args:
        format: of every matrix, bias and norm.
        norm_kind: ``rms`` or ``layer``; layer norms have a bias.
        eps: of every norm.
        unit_offset: norms scale by 1 + w (Gemma).
    """

    format: WeightFormat
    norm_kind: str
    eps: float
    unit_offset: bool = False

    @classmethod
    def rms(cls, facts: Facts, *, unit_offset: bool = False) -> Parts:
        """RMSNorm with the config's ``rms_norm_eps``."""
        return cls(facts.dtype, "rms", float(facts.of("rms_norm_eps", 1e-6)), unit_offset)

    @classmethod
    def layer_norm(cls, facts: Facts, eps_key: str) -> Parts:
        """LayerNorm with the config's eps."""
        return cls(facts.dtype, "layer", float(facts.of(eps_key, 1e-5)))

    def linear(self, n: int, k: int, bias: bool = False) -> LinearSpec:
        """One matrix [n, k]."""
        return LinearSpec(n=n, k=k, bias=bias, format=self.format, bias_format=self.format)

    def norm(self, size: int, *, weight: bool = True) -> NormSpec:
        """One norm; `weight` False for one without parameters."""
        return NormSpec(
            size=size,
            kind=self.norm_kind,
            eps=self.eps,
            bias=self.norm_kind == "layer",
            unit_offset=self.unit_offset,
            format=self.format,
            weight=weight,
        )

    def embedding(self, n: int, k: int, *, scale: float = 1.0, offset: int = 0) -> EmbeddingSpec:
        """One table [n, k]."""
        return EmbeddingSpec(n=n, k=k, format=self.format, scale=scale, offset=offset)

    def cache(self, heads: int, head_dim: int, v_head_dim: int | None = None) -> CacheSpec:
        """The cache of one layer; all heads alike."""
        page = PageFormat(self.format.kind)
        head = HeadSpec(
            head_dim=head_dim, v_head_dim=head_dim if v_head_dim is None else v_head_dim, k_format=page, v_format=page
        )
        return CacheSpec(heads=(head,) * heads)

    def attention(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: str = "",
        rope: RopeSpec | None = None,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        alibi: bool = False,
        sinks: bool = False,
        chunk: int | None = None,
        gated: bool = False,
    ) -> AttentionSpec:
        """Grouped-query attention.

        `qk_norm` is empty, ``head`` (over each head), ``all`` (over all heads together) or ``bare`` (over each, without weights).
        """
        whole, weight = qk_norm == "all", qk_norm != "bare"
        return AttentionSpec(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            q_proj=self.linear(heads * head_dim * (2 if gated else 1), hidden, qkv_bias),
            k_proj=self.linear(kv_heads * head_dim, hidden, qkv_bias),
            v_proj=self.linear(kv_heads * head_dim, hidden, qkv_bias),
            o_proj=self.linear(hidden, heads * head_dim, o_bias),
            q_norm=self.norm(heads * head_dim if whole else head_dim, weight=weight) if qk_norm else None,
            k_norm=self.norm(kv_heads * head_dim if whole else head_dim, weight=weight) if qk_norm else None,
            rope=rope,
            window=window,
            softcap=softcap,
            scale=head_dim**-0.5 if scale is None else scale,
            alibi=alibi,
            sinks=sinks,
            chunk=chunk,
            gated=gated,
            cache=self.cache(kv_heads, head_dim),
        )

    def gated(self, hidden: int, width: int, act: str, bias: bool = False) -> FFNSpec:
        """``down(act(gate(x)) * up(x))``."""
        return FFNSpec(
            gate_proj=self.linear(width, hidden, bias),
            up_proj=self.linear(width, hidden, bias),
            down_proj=self.linear(hidden, width, bias),
            act=act,
        )

    def plain(self, hidden: int, width: int, act: str, bias: bool = True) -> FFNSpec:
        """``down(act(up(x)))``."""
        return FFNSpec(
            gate_proj=None,
            up_proj=self.linear(width, hidden, bias),
            down_proj=self.linear(hidden, width, bias),
            act=act,
        )

    def layer(self, hidden: int, attention: Mixer, mlp: FFNSpec | MoESpec) -> LayerSpec:
        """Norm, attention, norm, MLP: the layer of Llama, GPT-2, OPT, BLOOM and most others."""
        return LayerSpec(
            input_layernorm=self.norm(hidden), self_attn=attention, post_attention_layernorm=self.norm(hidden), mlp=mlp
        )

    def states(self, elements: int, conv: ConvSpec, dtype: str) -> CacheSpec:
        """The cache of a recurrent layer: its state in `dtype`, and the inputs of the convolution but the newest."""
        return CacheSpec(
            states=(
                StateSpec(elements=elements, format=self.format, dtype=dtype),
                StateSpec(elements=conv.channels * (conv.kernel - 1), format=self.format),
            )
        )

    def model(self, facts: Facts, layers: tuple[LayerSpec, ...], *, tie: bool, **more: object) -> ModelSpec:
        """The whole model around `layers`; `tie` is the family's default where the config is silent."""
        hidden, vocab = int(facts.first("hidden_size", "n_embd", "n_embed")), int(facts["vocab_size"])
        parts: dict[str, object] = {
            "embed_tokens": self.embedding(vocab, hidden),
            "norm": self.norm(hidden),
            "lm_head": self.linear(vocab, hidden),
            "max_position_embeddings": facts.of("max_position_embeddings", 0),
        }
        return ModelSpec(
            name=facts.name,
            family=str(facts.of("model_type", "")).removesuffix("_text"),
            vocab_size=vocab,
            hidden_size=hidden,
            act_dtype=self.format.kind,
            layers=layers,
            tie_word_embeddings=bool(facts.of("tie_word_embeddings", tie)),
            **{**parts, **more},  # type: ignore[arg-type]
        )


def shared(layers: list[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Equal layers as one object: a spec of 80 layers is built, compared and edited as fast as one of two."""
    seen: dict[LayerSpec, LayerSpec] = {}
    return tuple(seen.setdefault(layer, layer) for layer in layers)
