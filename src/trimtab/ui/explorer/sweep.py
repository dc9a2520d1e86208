"""A case over batch and prompt length: cells for the curves and the map, and where something changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.predict.memory import UNBOUNDED
from trimtab.predict.request import Costs, Requests
from trimtab.spec.plan import Plan
from trimtab.ui.explorer.desk import MOST, Desk, blamed, grid
from trimtab.ui.explorer.types import Cell, Crossing, SweepReply, SweepRequest
from trimtab.units import format_seconds

#: Batches up to which crossings are looked for, all priced in one go.
_BATCHES = 1024


def sweep(desk: Desk, request: SweepRequest) -> SweepReply:
    """Price every batch at every prompt length.

    Raises:
        ApiError: 400.
    """
    priced = desk.price(request)
    batches = grid(request.batches, MOST["batch"], "batches")
    prompts = grid(request.prompts, MOST["prompt"], "prompts")
    with blamed("tp"):
        cells = [
            cell for prompt in prompts.tolist() for cell in _cells(_requests(priced, prompt), batches, prompt)
        ]  # fmt: skip
        requests = _requests(priced, request.prompt)
        usable = requests.usable_bytes
        memory = requests.footprint.at_batches(np.asarray(1), request.prompt, request.gen)
        crossings = _along_batch(priced.plan, requests, request) + _along_prompt(priced.plan, requests, request)
    return SweepReply(
        cells=cells, crossings=crossings, weight_bytes=float(memory.weights), capacity_bytes=float(usable)
    )


def _requests(priced: Any, prompt: int) -> Requests:
    plan: Plan = priced.plan
    work = plan.workload
    return Requests(
        priced.slices.graphs(plan.parallel), plan.machine, plan.stack, plan.parallel, prompt=prompt, gen=work.gen,
        concurrent=work.continuous, footprint=priced.slices.footprint(plan.parallel),
    )  # fmt: skip


def _cells(requests: Requests, batches: np.ndarray, prompt: int) -> list[Cell]:
    costs = requests.costs(batches)
    bounds = bound_of(costs, batches.shape)
    found = []
    for index, batch in enumerate(batches.tolist()):

        def at(values: Any, index: int = index) -> float:
            return float(np.broadcast_to(np.asarray(values, dtype=object), batches.shape)[index])

        peak = at(costs.memory.peak)
        found.append(
            Cell(
                batch=batch, prompt=prompt, ttft_s=at(costs.ttft_s),
                tpot_s=None if costs.tpot_s is None else at(costs.tpot_s),
                tokens_per_s=None if costs.tokens_per_s is None else at(costs.tokens_per_s),
                kv_bytes=at(costs.memory.kv_peak), peak_bytes=peak, fits=peak <= requests.usable_bytes, bound=bounds[index],
            )
        )  # fmt: skip
    return found


_PARTS = ("compute", "memory", "launch", "comm")


def bound_of(costs: Costs, shape: tuple[int, ...]) -> list[str]:
    """For each batch, what bounds most of the time of its decode steps (of its prefill where nothing is decoded)."""
    phase = "decode" if costs.tpot_s is not None else "prefill"
    share = {part: np.zeros(shape) for part in _PARTS}
    for each, times in costs.passes:
        if each.phase != phase:
            continue
        for kernel in times.kernels:
            parts = np.stack(
                [np.broadcast_to((getattr(kernel, f"{part}_s") * each.weight).sum(-1), shape) for part in _PARTS]
            )
            seconds = np.broadcast_to(kernel.times * (kernel.time_s * each.weight).sum(-1), shape)
            for index, part in enumerate(_PARTS):
                share[part] = share[part] + np.where(parts.argmax(0) == index, seconds, 0.0)
    order = np.stack([share[part] for part in _PARTS]).argmax(0)
    return [_PARTS[index] for index in order.tolist()]


def _along_batch(plan: Plan, requests: Requests, request: SweepRequest) -> list[Crossing]:
    batches = np.arange(1, _BATCHES + 1)
    costs = requests.costs(batches)
    found = []

    def first(holds: Any) -> int | None:
        """The first batch for which something holds that did not for a batch of 1."""
        told = np.broadcast_to(np.asarray(holds, bool), batches.shape)
        return None if told[0] or not told.any() else int(batches[told.argmax()])

    bounds = np.asarray(bound_of(costs, batches.shape))
    if at := first(bounds == "compute"):
        what = "decode" if costs.tpot_s is not None else "prefill"
        found.append(
            Crossing(axis="batch", at=at, what="compute", text=f"{what} becomes compute-bound at batch {at:,}")
        )
    if at := first(costs.memory.kv_peak > costs.memory.weights):
        found.append(
            Crossing(axis="batch", at=at, what="cache", text=f"the cache outgrows the weights at batch {at:,}")
        )
    most = requests.footprint.largest_batch(requests.prompt, requests.gen, requests.usable_bytes)
    if most < UNBOUNDED:
        text = f"at most batch {most:,} fits {plan.machine.id}" if most else f"no batch fits {plan.machine.id}"
        found.append(Crossing(axis="batch", at=most + 1, what="capacity", text=text))
    limits = ((request.ttft_limit_s, costs.ttft_s, "ttft"), (request.tpot_limit_s, costs.tpot_s, "tpot"))
    for limit, seconds, what in limits:
        if limit is not None and seconds is not None and (at := first(seconds > limit)):
            text = f"{what.upper()} passes {format_seconds(limit)} at batch {at:,}"
            found.append(Crossing(axis="batch", at=at, what=what, text=text))  # type: ignore[arg-type]
    return found


def _along_prompt(plan: Plan, requests: Requests, request: SweepRequest) -> list[Crossing]:
    found = []
    longest = requests.footprint.largest_context(request.batch, requests.usable_bytes, requests.gen)
    prompt = longest - requests.gen
    if longest < UNBOUNDED:
        text = f"prompts of up to {prompt:,} tokens fit at batch {request.batch:,}"
        if prompt < 1:
            text = f"no prompt fits at batch {request.batch:,}"
        found.append(Crossing(axis="prompt", at=max(prompt, 0) + 1, what="capacity", text=text))
    limit = plan.model.max_position_embeddings
    if limit:
        at = max(limit - requests.gen, 0) + 1
        found.append(
            Crossing(axis="prompt", at=at, what="positions", text=f"{plan.model.name} was made for {limit:,} positions")
        )
    return found
