"""Plan: model, machine, stack, workload and techniques as one printable value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.spec.machine import Machine, Stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.parallel import ALONE, Parallel
from trimtab.spec.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a prediction or a measurement depends on.

    Args:
        base: the model before techniques, in the plan's dtypes.
        model: the model with every technique composed in.
        techniques: canonical spec strings in the order given.
        dtype, kv_dtype: of float weights and activations, of the cache.
        source: where the weights are, as it was given; empty = the model's name.
        parallel: devices the model is spread over.
        assumed: parameters left at ``auto`` (``gemfilter:layer``), for which a shipped default stands in.
    """

    base: ModelSpec
    model: ModelSpec
    machine: Machine
    stack: Stack
    workload: Workload
    techniques: tuple[str, ...] = ()
    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    source: str = ""
    parallel: Parallel = ALONE
    assumed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON; names and hashes, not the tree."""
        return {
            "model": self.model.name,
            "model_hash": self.model.hash,
            "machine": self.machine.id,
            "stack": self.stack.name,
            "workload": self.workload.to_dict(),
            "techniques": list(self.techniques),
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "parallel": self.parallel.to_dict(),
        }

    def command(self, verb: str) -> str:
        """The command line that runs `verb` on this plan."""
        w = self.workload
        parts = [f"trimtab {verb} {self.source or self.model.name}"]
        if verb == "predict":
            parts.append(f"--on {self.machine.id}")
        parts.append(
            f"--batch {w.batch} --prompt {w.prompt} --gen {w.gen} --dtype {self.dtype} --kv-dtype {self.kv_dtype}"
        )
        parts.extend(f"-t {text}" for text in self.techniques)
        return " ".join(parts)
