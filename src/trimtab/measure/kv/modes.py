"""The two ways a cache is used again: turns of one conversation, and requests that share a context.

Multi-turn: context and first question are prefilled together, so a method that compresses sees that question; later turns
are appended to one growing cache. The history holds the right answers (golden) or the model's own.

Multi-request: the context alone is prefilled and compressed, before any question is known; every question starts from
that state, and what it wrote is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from trimtab.errors import SpecError, unknown
from trimtab.measure.kv.scorers import score
from trimtab.runtime.engine.generate import Session, check_context

if TYPE_CHECKING:
    from trimtab.measure.kv.dialogue import Turn
    from trimtab.measure.kv.prompts import Asked, Prompt
    from trimtab.runtime.cache.store import Mark
    from trimtab.runtime.engine.generate import Runner
    from trimtab.runtime.text.tokenizer import Tokenizer

Mode = Literal["multi-turn", "multi-request"]
MODES: tuple[Mode, ...] = ("multi-turn", "multi-request")
History = Literal["golden", "own"]
HISTORIES: tuple[History, ...] = ("golden", "own")

#: Most tokens of a question in one pass: each of them brings a row of logits.
_PIECE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one turn.

    Args:
        score: by the turn's rule, 0 to 1.
        nll_nats: of the right answer's tokens, summed, each after the right ones before it.
        prediction: greedy answer.
        history: text that stays in the cache as the answer; empty in multi-request mode.
        history_tokens: its tokens.
    """

    score: float
    nll_nats: float
    prediction: str
    history: str = ""
    history_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Run:
    """One dialogue under one method.

    Args:
        answers: of the turns, in order.
        prefill_tokens: tokens given to a prefill.
        query_tokens: tokens of questions appended to a cache that was there.
        recompute_tokens: tokens that would be prefilled if every turn started from nothing.
        held_bytes: of the cache once the context is in it and compressed (in multi-turn mode with the first question).
        final_bytes: of the cache after the last turn.
        peak_bytes: most bytes of pages taken while the context went in, those reserved for the questions included.
        prefill_s: time of that.
        decode_s: mean time of a decode step.
    """

    answers: list[Answer] = field(default_factory=list)
    prefill_tokens: int = 0
    query_tokens: int = 0
    recompute_tokens: int = 0
    held_bytes: int = 0
    final_bytes: int = 0
    peak_bytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """A state of a sequence to come back to."""

    mark: Mark
    length: int


class Track:
    """One sequence, driven and counted.

    Args:
        runner: the model under a method.
        reserve: most tokens it will come to.
    """

    def __init__(self, runner: Runner, reserve: int) -> None:
        check_context(runner.spec, reserve, 0)
        self.session = Session(runner)
        self.reserve = reserve
        self.prefilled = self.extended = self.decoded = 0
        self.prefill_s = self._decode_s = 0.0

    def prefill(self, ids: Iterable[int]) -> np.ndarray:
        """Run a prompt; logits after it [V]."""
        prompt = list(ids)
        start = time.perf_counter()
        logits = self.session.prefill([prompt], reserve=self.reserve - len(prompt))
        self.prefill_s += time.perf_counter() - start
        self.prefilled += len(prompt)
        return logits[0]

    def extend(self, ids: Iterable[int]) -> np.ndarray:
        """Append tokens; logits after the last [V]."""
        tokens, logits = list(ids), None
        for first in range(0, len(tokens), _PIECE):
            logits = self.session.extend([tokens[first : first + _PIECE]])
        if logits is None:
            raise SpecError("A question has no token. Ask something.")
        self.extended += len(tokens)
        return logits[-1]

    def decode(self, token: int) -> np.ndarray:
        """Append one token as decoding does; logits after it [V]."""
        start = time.perf_counter()
        logits = self.session.decode([token])
        self._decode_s += time.perf_counter() - start
        self.decoded += 1
        return logits[0]

    def mark(self) -> Point:
        """Remember this state."""
        return Point(self.session.store.mark(self.session.seqs[0]), self.session.lengths[0])

    def reset(self, point: Point) -> None:
        """Go back to a state, which stays usable."""
        self.session.store.reset(self.session.seqs[0], point.mark)
        self.session.lengths[0] = point.length

    def release(self, point: Point) -> None:
        """Give a state up."""
        self.session.store.release(point.mark)

    def end_turn(self) -> None:
        """Tell the cache that a turn is over."""
        self.session.end_turn()

    @property
    def decode_s(self) -> float:
        """Mean seconds of a decode step; NaN before the first."""
        return self._decode_s / self.decoded if self.decoded else float("nan")


def run(
    runner: Runner, prompt: Prompt, tokenizer: Tokenizer, *, mode: Mode = "multi-turn", history: History = "golden"
) -> Run:
    """Ask the questions of one dialogue.

    Args:
        runner: the model under a method.
        prompt: the dialogue as token ids.
        tokenizer: of the model.
        mode: ``multi-turn`` or ``multi-request``.
        history: in multi-turn mode, whether earlier answers in the history are right ones or the model's own.

    Raises:
        SpecError: unknown mode or history, or the dialogue exceeds the context.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if history not in HISTORIES:
        raise unknown("history", history, HISTORIES)
    track = Track(runner, prompt.most_tokens)
    try:
        drive = _turns if mode == "multi-turn" else _requests
        return drive(track, prompt, tokenizer, history)
    finally:
        track.session.close()


def _turns(track: Track, prompt: Prompt, tokenizer: Tokenizer, history: History) -> Run:
    found, seen = Run(), len(prompt.context)
    for index, asked in enumerate(prompt.turns):
        seen += len(asked.question)
        found.recompute_tokens += seen
        if index == 0:
            row = track.prefill([*prompt.context, *asked.question])
            _measure_prefill(found, track)
        else:
            row = track.extend(asked.question)
        answer = _answer(track, row, asked, tokenizer, keep=history)
        seen += answer.history_tokens
        found.answers.append(answer)
        track.end_turn()
    return _finished(found, track)


def _requests(track: Track, prompt: Prompt, tokenizer: Tokenizer, history: History) -> Run:
    del history  # no question sees another one
    found = Run()
    track.prefill(prompt.context)
    _measure_prefill(found, track)
    start = track.mark()
    for asked in prompt.turns:
        found.recompute_tokens += len(prompt.context) + len(asked.alone)
        row = track.extend(asked.alone)
        found.answers.append(_answer(track, row, asked, tokenizer, keep=None))
        track.reset(start)
    track.release(start)
    return _finished(found, track)


def _measure_prefill(found: Run, track: Track) -> None:
    store = track.session.store
    found.held_bytes, found.peak_bytes = store.nbytes(track.session.seqs[0]).held, store.peak_bytes


def _finished(found: Run, track: Track) -> Run:
    found.final_bytes = track.session.store.nbytes(track.session.seqs[0]).held
    found.prefill_tokens, found.query_tokens = track.prefilled, track.extended
    found.prefill_s, found.decode_s = track.prefill_s, track.decode_s
    return found


def _answer(track: Track, row: np.ndarray, asked: Asked, tokenizer: Tokenizer, *, keep: History | None) -> Answer:
    """Grade one turn twice from the same state: the right answer is fed token by token, and the model answers greedily.

    The cache is left with the right answer in it, with the model's own, or (None) as it happens to be.
    """
    start = track.mark()
    nll, agrees, first = 0.0, True, row
    for token in asked.gold:
        nll += _nll(row, token)
        agrees = agrees and int(row.argmax()) == token
        row = track.decode(token)
    golden = track.mark()
    if agrees:  # greedy would have said the same so far
        said, row = list(asked.gold), row
    else:
        track.reset(start)
        said, row = [], first
    track.release(start)
    prediction = _greedy(track, row, said, asked.turn, tokenizer)
    if keep == "golden":
        track.reset(golden)
    track.release(golden)
    kept = [] if keep is None else said if keep == "own" else list(asked.gold)
    return Answer(
        score=score(asked.turn, prediction),
        nll_nats=nll,
        prediction=prediction,
        history=tokenizer.decode(kept),
        history_tokens=len(kept),
    )


def _greedy(track: Track, row: np.ndarray, said: list[int], turn: Turn, tokenizer: Tokenizer) -> str:
    """Go on greedily after `said`, which grows; the answer's text."""
    while len(said) < turn.max_new_tokens and not _complete(tokenizer.decode(said), turn):
        token = int(row.argmax())
        if token in tokenizer.eog_ids:
            break
        row = track.decode(token)
        said.append(token)
    text = tokenizer.decode(said)
    return text if turn.lines else text.partition("\n")[0]


def _complete(text: str, turn: Turn) -> bool:
    return (turn.prefix + text).count("```") > 1 if turn.lines else "\n" in text


def _nll(row_V: np.ndarray, token: int) -> float:
    row = row_V.astype(np.float64)
    top = row.max()
    return float(top + np.log(np.exp(row - top).sum()) - row[token])
