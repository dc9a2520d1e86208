"""What the explorer's endpoints take and answer. The page's types are generated from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from trimtab.serve.types.common import Int64, Reply, Request

Text = Annotated[str, Meta(max_length=1024)]
Texts = Annotated[list[Text], Meta(max_length=16)]
Axis = Annotated[list[Int64], Meta(min_length=1, max_length=64)]


class Case(Request, kw_only=True):
    """What to price: model, machine, workload, techniques, layout. `machine` None: this one once calibrated, else an A100."""

    model: Text
    machine: Text | None = None
    stack: Text | None = None
    batch: Int64 = 1
    prompt: Int64 = 512
    gen: Int64 = 128
    continuous: bool = False
    techniques: Texts = msgspec.field(default_factory=list)
    dtype: Text = "bfloat16"
    kv_dtype: Text = "bfloat16"
    tp: Int64 = 1
    pp: Int64 = 1
    usd_per_h: float | None = None


class FigureReply(Reply, kw_only=True):
    """A real number with its band and origin; `value` None: `why` says what is missing."""

    value: float | None
    p10: float | None
    p90: float | None
    unit: str
    kind: str
    check: str
    why: str


class OpReply(Reply, kw_only=True):
    """Totals of one operator, layers together, over its phase."""

    phase: str
    name: str
    kind: str
    shape: str
    dtype: str
    count: int
    flops: float
    bytes: float
    time_s: float
    bound: str


class ReportReply(Reply, kw_only=True):
    """A prediction; see `trimtab.spec.report.Report`."""

    plan: dict[str, Any]
    counts: dict[str, float]
    figures: dict[str, FigureReply]
    observed: dict[str, float]
    ops: list[OpReply]
    notes: list[str]


class Bandwidth(Reply, kw_only=True):
    """A memory level."""

    name: str
    bytes_per_s: float


class Peak(Reply, kw_only=True):
    """What arithmetic in a dtype is priced at; `priced_as` another one where the machine has no path for it."""

    dtype: str
    priced_as: str
    flops_per_s: float


class Bound(Reply, kw_only=True):
    """What bounds most of a phase's time, and its share."""

    bound: str
    share: float


class PredictReply(Reply, kw_only=True):
    """A prediction, the same without techniques (None if there are none), and what the page draws around it."""

    report: ReportReply
    base: ReportReply | None
    bandwidths: list[Bandwidth]
    peaks: list[Peak]
    bounds: dict[str, Bound]
    fits: bool
    capacity_bytes: float
    command: str
    measurable: str


class ExplainRequest(Case, kw_only=True):
    """A case, and the count or figure to explain."""

    name: Text


class ExplainReply(Reply, kw_only=True):
    """What `trimtab predict --explain` prints, and the command that prints it."""

    text: str
    command: str


class DeltasRequest(Case, kw_only=True):
    """A case, and spec strings to try on top of its techniques."""

    candidates: Annotated[list[Text], Meta(min_length=1, max_length=64)]


class Delta(Reply, kw_only=True):
    """What one more technique makes of the case: new over old, or why it does not fit."""

    technique: str
    refused: str
    ttft: float | None = None
    tpot: float | None = None
    weights: float | None = None
    kv: float | None = None
    peak: float | None = None
    tokens_per_s: float | None = None
    fits: bool = False


class DeltasReply(Reply, kw_only=True):
    """One row per candidate, in order."""

    rows: list[Delta]


class SweepRequest(Case, kw_only=True):
    """A case whose batch and prompt vary; limits draw lines and crossings."""

    batches: Axis
    prompts: Axis
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None


class Crossing(Reply, kw_only=True):
    """Where something changes along an axis: `at` is the first value on the far side."""

    axis: Literal["batch", "prompt"]
    at: int
    what: Literal["compute", "capacity", "cache", "ttft", "tpot", "positions"]
    text: str


class Cell(Reply, kw_only=True):
    """One batch at one prompt length."""

    batch: int
    prompt: int
    ttft_s: float
    tpot_s: float | None
    tokens_per_s: float | None
    kv_bytes: float
    peak_bytes: float
    fits: bool
    bound: str


class SweepReply(Reply, kw_only=True):
    """Cells by prompt, then batch."""

    cells: list[Cell]
    crossings: list[Crossing]
    weight_bytes: float
    capacity_bytes: float


class SearchRequest(Request, kw_only=True):
    """As `trimtab plan`."""

    model: Text
    machines: Annotated[list[Text], Meta(min_length=1, max_length=16)]
    prompt: Int64 = 512
    gen: Int64 = 128
    counts: Annotated[list[Int64], Meta(min_length=1, max_length=8)] = msgspec.field(
        default_factory=lambda: [1, 2, 4, 8]
    )
    concurrency: Int64 = 256
    dtypes: Texts = msgspec.field(default_factory=lambda: ["bfloat16"])
    kv_dtypes: Texts = msgspec.field(default_factory=lambda: ["bfloat16"])
    techniques: Texts = msgspec.field(default_factory=list)
    ttft_s: float | None = None
    tpot_s: float | None = None
    usd_per_h: float | None = None
    usd_per_million_tokens: float | None = None


class Found(Reply, kw_only=True):
    """One combination at its best number of requests; `lost` says why it is not among the best."""

    machine: str
    stack: str
    tp: int
    pp: int
    dtype: str
    kv_dtype: str
    techniques: list[str]
    concurrency: int
    figures: dict[str, float | None]
    lost: str


class SearchReply(Reply, kw_only=True):
    """Plans that no other beats, then the others."""

    best: list[Found]
    lost: list[Found]
    evaluated: int


class ModelRow(Reply, kw_only=True):
    """A model whose shapes ship: its id, other names, architecture, and where its shapes come from."""

    id: str
    aliases: list[str]
    architecture: str
    source: str


class Models(Reply, kw_only=True):
    """Every model; `paths`: whether a folder or file of this machine may be named instead."""

    models: list[ModelRow]
    paths: bool


class MachineRow(Reply, kw_only=True):
    """A machine of the catalogue."""

    id: str
    name: str
    vendor: str
    kind: str
    year: int
    aliases: list[str]
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float
    flops_per_s: dict[str, float]
    usd_per_h: float | None
    tdp_w: float | None
    confidence: str
    source: str


class Machines(Reply, kw_only=True):
    """Every machine; `calibrated`: whether ``this`` is among them."""

    machines: list[MachineRow]
    stacks: list[str]
    calibrated: bool


class Parameter(Reply, kw_only=True):
    """A field of a technique's dataclass; `choices` where the type lists them."""

    name: str
    kind: Literal["int", "float", "bool", "choice", "text"]
    default: str
    allowed: str
    help: str
    choices: list[str]


class TechniqueRow(Reply, kw_only=True):
    """A technique and its parameters."""

    name: str
    summary: str
    seam: str
    stage: str
    needs: list[str]
    paper: int | None
    doc: str
    parameters: list[Parameter]


class Techniques(Reply, kw_only=True):
    """Every technique."""

    techniques: list[TechniqueRow]


class Claim(Reply, kw_only=True):
    """A line of a paper that `trimtab verify` checks; `documented`: why it is known not to hold."""

    id: str
    text: str
    needed: str
    documented: str


class PaperRow(Reply, kw_only=True):
    """A paper of the catalogue with the claims that are checked."""

    number: int
    title: str
    short: str
    year: int
    arxiv: str
    family: str
    kinds: list[str]
    seams: list[str]
    parts: list[str]
    state: str
    claims: list[Claim]


class Papers(Reply, kw_only=True):
    """All of them."""

    papers: list[PaperRow]


class Pair(Reply, kw_only=True):
    """One quantity of a run, predicted before it and measured."""

    name: str
    unit: str
    predicted: float
    p10: float | None
    p90: float | None
    measured: float
    low: float | None
    high: float | None
    exact: bool


class RunRow(Reply, kw_only=True):
    """A run of the ledger."""

    id: int
    started_utc: str
    state: str
    model: str
    machine: str
    stack: str
    version: str
    techniques: list[str]
    dtype: str
    kv_dtype: str
    batch: int
    prompt: int
    gen: int
    pairs: list[Pair]
    quality: dict[str, float]
    notes: list[str]
    error: str


class Runs(Reply, kw_only=True):
    """The ledger, newest first."""

    runs: list[RunRow]


class Progress(Reply, kw_only=True):
    """The measurement that runs, or the last one."""

    state: Literal["idle", "running", "done", "failed", "cancelled"]
    command: str = ""
    label: str = ""
    done: int = 0
    total: int = 0
    elapsed_s: float = 0.0
    error: str = ""


class CompatRow(Reply, kw_only=True):
    """An operator of one layer as another tool counts it."""

    name: str
    times: int
    ops: float
    bytes: float
    time_s: float
    bound: str


class Fault(Reply, kw_only=True):
    """What a fault of that tool adds."""

    name: str
    sentence: str
    ops: float
    bytes: float
    time_s: float


class CompatStage(Reply, kw_only=True):
    """A phase: operators, their totals, ours, and what lies between."""

    operators: list[CompatRow]
    total: dict[str, float]
    trimtab: dict[str, float]
    faults: list[Fault]


class CompatReply(Reply, kw_only=True):
    """The numbers of another tool."""

    tool: str
    prefill: CompatStage
    decode: CompatStage
