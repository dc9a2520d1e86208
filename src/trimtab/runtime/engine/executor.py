"""Carries out the scheduler's steps on a runner and its KV store: the same for the native program and the torch decoder.

Legend: T tokens of a pass, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.runtime.engine.generate import Runner
from trimtab.runtime.step import Step
from trimtab.sched.kv import NBytes, cache_bytes
from trimtab.sched.work import Row, StepWork
from trimtab.spec.cache import All, HeadSpec
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.runtime.cache.store import Seq


class Known(NamedTuple):
    """What a pass must know of a request.

    Args:
        prompt: tokens of its prompt.
        reach: tokens each of its sequences will have in the end, at most.
        every: whether logits of every prompt token are wanted.
    """

    prompt: int
    reach: int
    every: bool = False


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of the rows of a step.

    Args:
        logits_RV: float32; of a row with `every` all of its tokens, of others with a `sample` the last one.
        first: of each row of the step, where its logits begin; its last token's stand at ``last``.
        last: of each row, where the logits after its last token stand; -1 = it has none.
        failed: rows that could not be run, and why.
    """

    logits_RV: np.ndarray
    first: tuple[int, ...]
    last: tuple[int, ...]
    failed: dict[int, Exception]


class StepExecutor:
    """Sequences and kept prefixes of one model, driven by `StepWork`.

    Args:
        runner: the model.
        known: from a request's id to what a pass must know of it.
        alike: run the last token of a prompt together with the one before it if it would come alone. Passes of one token take
            another path through the kernels, so that where a prompt was cut would show in the last bits; costs a page at most.

    Attributes:
        store: keys and values.
    """

    def __init__(self, runner: Runner, known: Callable[[str], Known], *, alike: bool = False) -> None:
        self.runner, self.store = runner, runner.open_store()
        self._known, self._alike = known, alike
        self._seqs: dict[int, Seq] = {}
        self._requests: dict[int, str] = {}
        self._marks: dict[int, Seq] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages of all sequences and kept prefixes."""
        return self.store.pages_bytes

    @property
    def sequences(self) -> frozenset[int]:
        """Sequences that have pages."""
        return frozenset(self._seqs)

    def run(self, work: StepWork, tokens: Callable[[Row], Sequence[int]]) -> Ran:
        """Carry out a step: marks, forks, free, preempt, release, starts, then all rows in one pass.

        A pass that fails is tried again row by row, so that only the rows at fault fail.

        Args:
            work: of the scheduler.
            tokens: from a row to its token ids.
        """
        self._arrange(work)
        rows = work.rows
        if not rows:
            return Ran(np.empty((0, self.runner.spec.vocab_size), np.float32), (), (), {})
        ids = [np.asarray(tokens(row), np.int64) for row in rows]
        everyone = list(range(len(rows)))
        try:
            return self._pass(rows, ids, everyone, tokens)
        except (TrimtabError, ArithmeticError, ValueError) as error:
            if len(rows) == 1 or not self._rewound(rows):
                return self._nothing(rows, error)
        return self._one_by_one(rows, ids, tokens)

    def close(self) -> None:
        """Free everything."""
        for seq in (*self._seqs.values(), *self._marks.values()):
            self.store.free(seq)
        self._seqs, self._marks, self._requests = {}, {}, {}

    def _arrange(self, work: StepWork) -> None:
        store, seqs = self.store, self._seqs
        for mark in work.marks:
            self._marks[mark.mark] = self._copy(seqs[mark.seq], mark.tokens)
        for fork in work.forks:
            seqs[fork.seq] = self._copy(seqs[fork.parent], fork.tokens)
            self._requests[fork.seq] = fork.request
        for gone in (*work.free, *work.preempt):
            if (seq := seqs.pop(gone, None)) is not None:
                store.free(seq)
                del self._requests[gone]
        for name in work.release:
            store.free(self._marks.pop(name))
        for start in work.starts:
            seqs[start.seq] = store.open() if start.mark is None else self._copy(self._marks[start.mark], start.tokens)
            self._requests[start.seq] = start.request

    def _copy(self, seq: Seq, tokens: int) -> Seq:
        copy = self.store.fork(seq)
        if copy.length > tokens:
            self.store.truncate(copy, tokens)
        return copy

    def _pass(
        self, rows: Sequence[Row], ids: list[np.ndarray], which: list[int], tokens: Callable[[Row], Sequence[int]]
    ) -> Ran:
        new, past, seqs, reach, ends = [], [], [], [], []
        pieces: list[np.ndarray] = []
        wanted: list[int] = []
        first, last = [-1] * len(rows), [-1] * len(rows)
        at = 0
        for index in which:
            row, piece = rows[index], ids[index]
            known = self._known(self._requests[row.seq])
            seq, done, count = self._seqs[row.seq], row.first, row.count
            if self._alike and count == 1 and 0 < done < known.prompt:
                self.store.truncate(seq, done - 1)
                done, count = done - 1, 2
                piece = np.asarray(tokens(Row(row.seq, done, count, ())), np.int64)
            new.append(count)
            past.append(done)
            seqs.append(seq)
            reach.append(max(known.reach, done + count))
            ends.append(done < known.prompt <= done + count)
            pieces.append(piece)
            at += count
            if known.every and row.first < known.prompt:
                first[index] = len(wanted)
                wanted.extend(range(at - row.count, at))
                last[index] = len(wanted) - 1
            elif row.sample:
                first[index] = last[index] = len(wanted)
                wanted.append(at - 1)
        step = Step.of(new, past, seqs, None, reach, ends)
        flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        logits_RV = self.runner.forward(flat, step, self.store, np.array(wanted, np.int64))
        return Ran(logits_RV, tuple(first), tuple(last), {})

    def _rewound(self, rows: Sequence[Row]) -> bool:
        """Bring the sequences of rows back to before a pass that failed; False where their caches cannot go back."""
        try:
            for row in rows:
                seq = self._seqs[row.seq]
                self.store.truncate(seq, min(row.first, seq.length))
        except TrimtabError:
            return False
        return True

    def _one_by_one(
        self, rows: Sequence[Row], ids: list[np.ndarray], tokens: Callable[[Row], Sequence[int]]
    ) -> Ran:
        parts, failed = [], {}
        first, last, count = [-1] * len(rows), [-1] * len(rows), 0
        for index in range(len(rows)):
            try:
                ran = self._pass(rows, ids, [index], tokens)
            except (TrimtabError, ArithmeticError, ValueError) as error:
                failed[index] = error
                continue
            if ran.last[index] >= 0:
                first[index], last[index] = count + ran.first[index], count + ran.last[index]
            parts.append(ran.logits_RV)
            count += len(ran.logits_RV)
        empty = np.empty((0, self.runner.spec.vocab_size), np.float32)
        return Ran(np.concatenate([empty, *parts]), tuple(first), tuple(last), failed)

    def _nothing(self, rows: Sequence[Row], error: Exception) -> Ran:
        empty = np.empty((0, self.runner.spec.vocab_size), np.float32)
        none = (-1,) * len(rows)
        return Ran(empty, none, none, dict.fromkeys(range(len(rows)), error))


def rewindable(spec: ModelSpec) -> bool:
    """Whether sequences of a model can be cut back to any length: every head keeps all its tokens as they were written."""
    heads = {head for layer in spec.layers for head in layer.cache.heads}
    plain = all(isinstance(head.keep, All) and not head.seals and head.policy is None for head in heads)
    return plain and not any(layer.cache.state_bytes for layer in spec.layers)


def block_tokens(spec: ModelSpec) -> int:
    """Tokens of the smallest block that is whole pages of every head."""
    pages = {
        size
        for layer in spec.layers
        for head in layer.cache.heads
        for size in (head.page_tokens(head.k_format), head.page_tokens(head.v_format))
    }
    return math.lcm(*pages) if pages else 64


def bound_bytes(spec: ModelSpec) -> NBytes:
    """Make the function tokens -> bytes that one sequence never exceeds, also while a prompt runs.

    Exact for caches that keep tokens as they were written. Where tokens are coded or given up later, what is held in the end and
    all tokens as they land, whole, are added: an upper bound that is safe rather than tight.
    """
    if rewindable(spec):
        return cache_bytes(spec)
    heads: dict[HeadSpec, int] = {}
    for layer in spec.layers:
        for head in layer.cache.heads:
            heads[head] = heads.get(head, 0) + 1
    states = sum(layer.cache.state_bytes for layer in spec.layers)

    def nbytes(tokens: int) -> int:
        total = states
        for head, count in heads.items():
            pages = -(-tokens // head.landing_page) + 1
            landing = pages * head.landing_page * head.landing_bytes()
            total += count * (head.nbytes(tokens).reserved + landing)
        return total

    return nbytes


def alike(runner: Runner) -> bool:
    """Whether rows get the same logits to the bit alone and beside others, and prompts however they are cut: tried, not proved.

    Source: none; pieces of a prompt have two tokens or more, since passes of one token run other kernels.
    """
    most = min(runner.spec.max_position_embeddings, 40)
    ids = np.arange(7, 7 + most, dtype=np.int64) % runner.spec.vocab_size
    if most < 16:
        return False

    def last(cuts: Sequence[int], others: int) -> np.ndarray:
        store = runner.open_store()
        seq, done = store.open(), 0
        rest = [store.open() for _ in range(others)]
        logits = np.empty((0, runner.spec.vocab_size), np.float32)
        for turn, count in enumerate((*cuts, 1)):
            new, past = [count, *[1] * others], [done, *[turn] * others]
            step = Step.of(new, past, [seq, *rest], None, [most] * len(new), [False] * len(new))
            flat = np.concatenate((ids[done : done + count], np.full(others, 3 + turn)))
            logits = runner.forward(flat, step, store, step.cu[1:] - 1)
            done += count
        return logits[0]

    whole = most - 1
    alone = last([whole], 0)
    return all(
        np.array_equal(alone, last(cuts, others))
        for cuts, others in (([whole], 1), ([whole], 15), ([2, whole - 2], 0), ([whole - 9, 9], 7), ([11, whole - 11], 3))
    )
