"""Predict every recorded table at hand and judge it: what `trimtab validate` shows and what the tests hold to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError, unknown
from trimtab.measure.recorded.scoreboard import Case, Line, judge
from trimtab.measure.recorded.tables import known_tables, load_json, load_table, tables
from trimtab.measure.recorded.validate_kernels import kernels, llmcompass, moe
from trimtab.measure.recorded.validate_models import llama_cpp, megatron, mpt, seqsel
from trimtab.measure.recorded.validate_serving import serving
from trimtab.spec.machine import Stack, aliases, load_stack, machine_ids

#: Stack whose constants price recorded kernels: those of the machine, where it has some.
STACK = "vllm"

#: Columns of a table (or its JSON), machine id to keep (None = all) and the stack whose constants are judged -> cases.
Predictor = Callable[[Any, str | None, Stack], Iterable[Case]]

#: Table -> how it is predicted. A table that is added here is validated from then on.
PREDICTORS: dict[str, Predictor] = {
    "gemm": kernels("gemm"),
    "attention_prefill": kernels("attention_prefill"),
    "attention_decode": kernels("attention_decode"),
    "moe": moe,
    "collectives": kernels("collectives"),
    "e2e_serving": serving,
    "llmcompass_matmul": llmcompass,
    "llamacpp_llama3": llama_cpp,
    "megatron_a100_generation": megatron,
    "mpt_training": mpt,
    "megatron_seqsel": seqsel,
}


def validate(
    folder: str | Path | None = None,
    table: str | None = None,
    device: str | None = None,
    stack: Stack | None = None,
) -> list[Line]:
    """Predict every recorded table at hand and judge it.

    Args:
        folder: a data folder whose tables are read as well; those it holds go before those of the package.
        table: only this one.
        device: only this machine, by id or alias.
        stack: constants to judge; None = those that ship.

    Raises:
        SpecError: no such table, or no row of that device or of any known one.
    """
    found = {name: folder for name in tables(folder)} if folder is not None else {}
    at_hand = {name: found.get(name) for name in PREDICTORS if name in found or name in tables()}
    if table is not None and table not in at_hand:
        missing = table in PREDICTORS
        hint = "It does not ship: give the folder that holds it as --data." if missing else ""
        raise unknown("recorded table", table, at_hand, hint)
    if device in aliases():
        device = aliases()[device]
    chosen = stack or load_stack(STACK)
    lines = [
        judge(case)
        for name, place in at_hand.items()
        if table in (None, name)
        for case in PREDICTORS[name](_read(name, place), device, chosen)
    ]
    if lines:
        return lines
    if device is None:
        raise SpecError(
            "No recorded row can be judged: no device of these tables is in the catalogue (`trimtab machines`)."
        )
    devices = sorted({line.device for line in validate(folder, table, None, chosen)} & set(machine_ids()))
    raise unknown("device", device, devices, "These have recorded rows.")


def _read(name: str, place: str | Path | None) -> Any:
    """A table as columns, or as what its JSON holds."""
    if known_tables()[name].path.endswith(".json") and place is not None:
        return load_json(name, place)
    return load_table(name, place)
