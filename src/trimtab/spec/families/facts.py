"""Reading a Hugging Face config: required keys, both spellings of rope, dtype and activation names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trimtab.errors import SpecError, unknown
from trimtab.spec.formats import WeightFormat, float_format
from trimtab.spec.leaves import RopeSpec

#: HF activation names -> ours. ``gelu_new`` and ``gelu_fast`` are one formula, the tanh approximation.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}  # fmt: skip

#: Keys that are spelt in either way: (as found, as the families here ask for it).
_ALIKE = (
    ("num_local_experts", "num_experts"),
    ("num_experts", "num_local_experts"),
    ("num_local_experts", "n_routed_experts"),
)

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class Facts(Mapping[str, Any]):
    """The config of one model; a key that is null counts as absent for `of`, a required one that is absent is named."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        # A multimodal config nests the language model; dtype and ties may stand outside.
        self._items = (
            {**{k: v for k, v in config.items() if k != "text_config"}, **text}
            if isinstance(text, Mapping)
            else dict(config)
        )
        # Newer transformers write one spelling of the number of experts for all families.
        for one, other in _ALIKE:
            if one in self._items:
                self._items.setdefault(other, self._items[one])
        self.name = name

    def __getitem__(self, key: str) -> Any:
        if self._items.get(key) is None:
            raise SpecError(f"{self.name}: the config lacks the key '{key}'. Add it to config.json.")
        return self._items[key]

    def __contains__(self, key: object) -> bool:
        return self._items.get(key) is not None  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def of(self, key: str, default: Any) -> Any:
        """The value of `key`; `default` if it is absent or null."""
        value = self._items.get(key)
        return default if value is None else value

    def first(self, *keys: str) -> Any:
        """The value of the first of `keys` that is there.

        Raises:
            SpecError: none is; the first is named.
        """
        return self[next((key for key in keys if key in self), keys[0])]

    def given(self, key: str, default: Any) -> Any:
        """The value of `key`, null included; `default` only if it is absent."""
        return self._items.get(key, default)

    def need(self, *keys: str) -> None:
        """Refuse a config that lacks any of `keys`.

        Raises:
            SpecError: names every missing key.
        """
        missing = [key for key in keys if self._items.get(key) is None]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            raise SpecError(
                f"{self.name}: the config lacks the key{plural} {', '.join(missing)}. "
                f"A {self.of('model_type', 'model')} config needs {', '.join(keys)}."
            )

    @property
    def dtype(self) -> WeightFormat:
        """The float format the config names (``torch_dtype`` or ``dtype``); bf16 if it names none."""
        return float_format(self.of("torch_dtype", self.of("dtype", "bfloat16")))

    def act(self, *keys: str) -> str:
        """The activation under the first key present, in Trimtab's spelling.

        Raises:
            SpecError: an activation no decoder here computes.
        """
        asked = next((self._items[key] for key in keys if self._items.get(key) is not None), "silu")
        if asked not in ACTIVATIONS:
            raise unknown("activation", str(asked), ACTIVATIONS)
        return ACTIVATIONS[asked]

    def layer_types(
        self, layers: int, default: list[str], allowed: tuple[str, ...] = ("sliding_attention", "full_attention")
    ) -> list[str]:
        """What every layer is, one of `allowed`.

        Raises:
            SpecError: a list of another length, or another kind of layer.
        """
        found = self.of("layer_types", default)
        if len(found) != layers:
            raise SpecError(
                f"{self.name}: layer_types has {len(found)} entries for {layers} layers. Give one per layer."
            )
        for kind in found:
            if kind not in allowed:
                raise unknown("layer type", str(kind), allowed)
        return list(found)

    def window(self, size: int | None) -> int | None:
        """A sliding window, or None where it is as long as the context and so never binds."""
        return size if size is not None and size < self["max_position_embeddings"] else None

    def rope(
        self, head_dim: int, kind: str | None = None, *, theta: float | None = None, scaled: bool = True
    ) -> RopeSpec:
        """The rotary embedding, from ``rope_parameters`` (also one per layer type) or ``rope_theta`` + ``rope_scaling``.

        Args:
            head_dim: the elements of a head; ``partial_rotary_factor`` rotates only the first part of it.
            kind: layer type whose parameters are wanted, where they differ.
            theta: base that wins over the config's (Gemma 3 local layers in the older spelling).
            scaled: False ignores ``rope_scaling`` of the older spelling.

        Raises:
            SpecError: a rope type Trimtab does not compute.
        """
        nested = self.of("rope_parameters", {})
        if kind is not None and kind in nested:
            parameters, theta, scaled = dict(nested[kind]), None, True
        elif "rope_theta" in nested or "rope_type" in nested:
            parameters = dict(nested)
        else:
            parameters = dict(self.of("rope_scaling", {})) if scaled else {}
        base = float(theta if theta is not None else parameters.get("rope_theta", self.of("rope_theta", 10000.0)))
        share = float(parameters.get("partial_rotary_factor", self.of("partial_rotary_factor", 1.0)))
        kind_of_rope = parameters.get("rope_type", parameters.get("type", "default"))
        kind_of_rope = "longrope" if kind_of_rope == "su" else kind_of_rope
        if kind_of_rope not in ROPE_TYPES:
            raise unknown("rope type", str(kind_of_rope), ROPE_TYPES)
        dim = int(head_dim * share)
        if kind_of_rope == "default":
            return RopeSpec(dim=dim, theta=base)
        skip = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
        scaling = {key: value for key, value in parameters.items() if key not in skip and value is not None}
        self._complete(kind_of_rope, scaling)
        return RopeSpec(
            dim=dim,
            theta=base,
            scaling=(("rope_type", kind_of_rope), *sorted((k, _frozen(v)) for k, v in scaling.items())),
        )

    def _complete(self, kind: str, scaling: dict[str, Any]) -> None:
        """Put into `scaling` what Hugging Face takes from elsewhere in the config, so that a RopeSpec stands alone."""
        context = self["max_position_embeddings"]
        if kind == "dynamic":
            scaling.setdefault("original_max_position_embeddings", context)
        if kind in ("longrope", "yarn"):
            original = scaling.get(
                "original_max_position_embeddings", self.of("original_max_position_embeddings", context)
            )
            scaling["original_max_position_embeddings"] = original
            scaling.setdefault("factor", context / original)


def _frozen(value: Any) -> Any:
    """JSON lists as tuples, so that a spec stays hashable."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
