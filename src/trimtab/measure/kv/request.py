"""What to evaluate: methods, tasks, lengths, modes; and what cannot be, refused before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import SpecError, unknown
from trimtab.measure.kv.modes import HISTORIES, MODES, History, Mode
from trimtab.measure.kv.tasks import MOST_TURNS, find_task
from trimtab.measure.kv.through_cache import STEPS
from trimtab.techniques.registry import parse_all

if TYPE_CHECKING:
    from trimtab.spec.model import ModelSpec
    from trimtab.techniques.base import Technique

#: The method without techniques.
FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to evaluate.

    Args:
        methods: spec strings; ``full`` = no technique. The full cache always runs, for comparison.
        tasks: names, see `tasks.TASKS`.
        lengths: most tokens of a context.
        modes: ``multi-turn``, ``multi-request``.
        turns: questions about a context; None = 5, fewer where a task has fewer.
        sessions: dialogues of each task and length.
        seed: of dialogues and of the bootstrap.
        history: ``golden`` or ``own`` answers in the history of multi-turn dialogues.
        data: jsonl file of SCBench's form to evaluate besides the tasks.
        windows: windows of text for perplexity, KL and agreement; 0 leaves them out.
        window: tokens of one.
        steps: decode steps compared in each.
    """

    methods: tuple[str, ...] = (FULL,)
    tasks: tuple[str, ...] = ("kv", "needles")
    lengths: tuple[int, ...] = (512,)
    modes: tuple[Mode, ...] = ("multi-turn",)
    turns: int | None = None
    sessions: int = 2
    seed: int = 0
    history: History = "golden"
    data: Path | None = None
    windows: int = 1
    window: int = 512
    steps: int = STEPS

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(dict.fromkeys((FULL, *self.methods))))
        for name in self.tasks:
            find_task(name)
        for mode in self.modes:
            if mode not in MODES:
                raise unknown("mode", mode, MODES)
        if self.history not in HISTORIES:
            raise unknown("history", self.history, HISTORIES)
        if self.sessions < 1:
            raise SpecError(f"sessions={self.sessions} is not possible. Allowed: 1 or more. Try --sessions 4.")
        if self.turns is not None and not 1 <= self.turns <= MOST_TURNS:
            raise SpecError(f"turns={self.turns} is not possible. Allowed: 1..{MOST_TURNS}. Try --turns 5.")
        if not 1 <= self.steps < self.window:
            raise SpecError(
                f"A window of {self.window} tokens has no {self.steps} steps after a prompt. Give fewer steps."
            )


#: What the tiers ask for: a look within a minute, and the whole table within twenty (135M parameters, two methods, one core).
TIERS: dict[str, Request] = {
    "smoke": Request(modes=MODES, turns=3, sessions=1, window=384),
    "full": Request(
        tasks=("kv", "needles", "mix", "prefix_suffix", "multihop", "manyshot"),
        lengths=(512, 1024),
        modes=MODES,
        sessions=3,
        windows=2,
        window=1024,
    ),
}


def parse_methods(asked: str) -> tuple[str, ...]:
    """Split ``"full;streaming-llm:sink=4,recent=252"``; every method is checked, and the full cache comes first.

    Raises:
        SpecError: unknown technique or parameter.

    >>> parse_methods("streaming-llm:recent=252")
    ('full', 'streaming-llm:recent=252')
    """
    found = [method.strip() for method in asked.split(";") if method.strip()]
    for method in found:
        techniques_of(method)
    return tuple(dict.fromkeys([FULL, *found]))


def techniques_of(method: str) -> tuple[Technique, ...]:
    """Techniques of a method; none for the full cache."""
    return () if method == FULL else parse_all([method])


def check(request: Request, spec: ModelSpec) -> None:
    """Refuse what cannot run, before any weight is read.

    Raises:
        SpecError: contexts longer than the model's, or a method that needs the prompt's question while compressing
            in multi-request mode.
    """
    for tokens in request.lengths:
        if tokens >= spec.max_position_embeddings:
            raise SpecError(
                f"len={tokens} and the questions do not fit the context of {spec.name}, {spec.max_position_embeddings} "
                f"tokens. Try --len {spec.max_position_embeddings // 2}."
            )
    if "multi-request" not in request.modes:
        return
    for method in request.methods:
        for technique in techniques_of(method):
            if "prompt_ids" in technique.needs:
                raise SpecError(
                    f"{technique.name} chooses prompt tokens by the question at their end; in multi-request mode the context "
                    "is prefilled before any question is known. Try --mode multi-turn."
                )
