"""Comparisons for the page: the search for plans, and another tool's numbers."""

from __future__ import annotations

from trimtab.api import find_plans
from trimtab.predict.compat import Case as ViewerCase
from trimtab.predict.search import Candidate, Limits
from trimtab.serve.errors import ApiError
from trimtab.spec.configs import load_spec
from trimtab.spec.machine import load_machine
from trimtab.ui.compat import compat_json
from trimtab.ui.explorer.desk import MOST, Desk, blamed, grid, workload_of
from trimtab.ui.explorer.types import (
    Case,
    CompatReply,
    CompatRow,
    CompatStage,
    Fault,
    Found,
    SearchReply,
    SearchRequest,
)

#: Losers that are sent; the page shows why they lost.
_LOSERS = 60
#: Most combinations of formats, techniques, machines and device counts of one search.
_COMBINATIONS = 256


def search(desk: Desk, request: SearchRequest) -> SearchReply:
    """Find plans as `trimtab plan` does.

    Raises:
        ApiError: 400.
    """
    with blamed("model"):
        model = desk.named(request.model)
    for name, value, most in (
        ("prompt", request.prompt, MOST["prompt"]), ("gen", request.gen, MOST["gen"]), ("concurrency", request.concurrency, 4096),
    ):  # fmt: skip
        if not 1 <= value <= most:
            raise ApiError(
                400, f"{name}={value} is not possible. Allowed: a whole number from 1 to {most:,}.", param=name
            )
    counts = grid(request.counts, 64, "counts").tolist()
    size = len(request.machines) * len(counts) * max(len(request.dtypes), 1) * max(len(request.kv_dtypes), 1)
    size *= len(request.techniques) + 1
    if size > _COMBINATIONS:
        raise ApiError(
            400, f"{size} combinations are asked for. Allowed: {_COMBINATIONS}. Name fewer machines, formats or techniques.",
            param="machines",
        )  # fmt: skip
    with blamed("machines"):
        machines = [load_machine(name) for name in request.machines]
    with blamed("limits"):
        limits = Limits(
            ttft_s=request.ttft_s, tpot_s=request.tpot_s, usd_per_h=request.usd_per_h,
            usd_per_million_tokens=request.usd_per_million_tokens,
        )  # fmt: skip
        found = find_plans(
            model, machines, prompt=request.prompt, gen=request.gen, counts=counts, concurrency=request.concurrency,
            dtypes=request.dtypes or ["bfloat16"], kv_dtypes=request.kv_dtypes or ["bfloat16"], techniques=request.techniques,
            limits=limits,
        )  # fmt: skip
    return SearchReply(
        best=[_row(each) for each in found.best],
        lost=[_row(each) for each in found.lost[:_LOSERS]],
        evaluated=found.evaluated,
    )


def _row(candidate: Candidate) -> Found:
    return Found(
        machine=candidate.machine.id, stack=candidate.stack.name, tp=candidate.parallel.tp, pp=candidate.parallel.pp,
        dtype=candidate.variant.dtype, kv_dtype=candidate.variant.kv_dtype, techniques=list(candidate.variant.techniques),
        concurrency=candidate.concurrency, figures=candidate.figures, lost=candidate.lost,
    )  # fmt: skip


def compat(desk: Desk, case: Case) -> CompatReply:
    """LLM-Viewer's numbers of a case, in 16 bits as that tool has them.

    Raises:
        ApiError: 400.
    """
    work = workload_of(case)
    with blamed("model"):
        named = desk.named(case.model)
        spec = (load_spec(named) if isinstance(named, str) else named).with_dtype("float16")
    with blamed("machine"):
        machine = load_machine(case.machine or "a100")
    with blamed("model"):
        found = compat_json(spec, machine, ViewerCase(batch=work.batch, seqlen=work.prompt), work.gen)
    stages = {
        phase: CompatStage(
            operators=[CompatRow(**row) for row in found[phase]["operators"]], total=found[phase]["total"],
            trimtab=found[phase]["trimtab"], faults=[Fault(**row) for row in found[phase]["faults"]],
        )
        for phase in ("prefill", "decode")
    }  # fmt: skip
    return CompatReply(tool=found["tool"], **stages)
