"""Carries out the scheduler's steps on a runner and its KV store: the same for the native program and the torch decoder.

Legend: T tokens of a pass, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.runtime.engine.bounds import rows_alike
from trimtab.runtime.engine.generate import Runner
from trimtab.runtime.step import Step
from trimtab.sched.work import Row, StepWork

if TYPE_CHECKING:
    from trimtab.runtime.cache.store import Seq


#: What a pass may raise because of the rows it runs.
FAULTS = (TrimtabError, ArithmeticError, ValueError, RuntimeError)
#: Tokens of a piece of a prompt where pieces are fixed.
PIECE = 64


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
        begin: of each row, the token its first logits come after; differs from its `first` only where pieces are ``fixed``.
        failed: rows that could not be run, and why.
    """

    logits_RV: np.ndarray
    first: tuple[int, ...]
    last: tuple[int, ...]
    begin: tuple[int, ...]
    failed: dict[int, Exception]


class StepExecutor:
    """Sequences and kept prefixes of one model, driven by `StepWork`.

    Args:
        runner: the model.
        known: from a request's id to what a pass must know of it.
        fixed: run prompts in pieces that begin at multiples of `PIECE`, each in a pass of its own, and answers alone too unless
            their logits are the same to the bit beside others. What a request gets then depends on nothing but itself: kernels
            differ in the last bits with the number of tokens of a pass. What a piece lacks waits for a later step, so nothing
            of this is to be cut back or marked.

    Attributes:
        store: keys and values.
        pass_s: seconds in passes.
    """

    def __init__(self, runner: Runner, known: Callable[[str], Known], *, fixed: bool = False) -> None:
        self.runner, self.store = runner, runner.open_store()
        self.pass_s = 0.0
        self._known, self._fixed = known, fixed
        self._together = not fixed or rows_alike(runner)
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
            return self._nothing((), None)
        if self._fixed:
            return self._pieces(rows, tokens)
        pieces = [_Piece(index, row.first, row.count) for index, row in enumerate(rows)]
        try:
            return self._joined(rows, [self._pass(rows, pieces, tokens)], {})
        except FAULTS as error:
            if len(rows) == 1 or not self._rewound(rows):
                return self._nothing(rows, error)
        return self._apart(rows, [[piece] for piece in pieces], tokens)

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
        self, rows: Sequence[Row], pieces: Sequence[_Piece], tokens: Callable[[Row], Sequence[int]]
    ) -> tuple[np.ndarray, list[_Piece]]:
        """Run pieces of rows together; returns logits, and of each piece that has some, in order, how many."""
        past, new, seqs, reach, ends, ids, wanted = [], [], [], [], [], [], []
        told: list[_Piece] = []
        at = 0
        for piece in pieces:
            row, (index, first, count) = rows[piece.row], piece
            known = self._known(self._requests[row.seq])
            past.append(first)
            new.append(count)
            seqs.append(self._seqs[row.seq])
            reach.append(max(known.reach, first + count))
            ends.append(first < known.prompt <= first + count)
            ids.append(np.asarray(tokens(Row(row.seq, first, count, ())), np.int64))
            at += count
            if known.every and first < known.prompt:
                wanted.extend(range(at - count, at))
                told.append(piece)
            elif row.sample and first + count == row.first + row.count:
                wanted.append(at - 1)
                told.append(_Piece(index, first + count - 1, 1))
        step = Step.of(new, past, seqs, None, reach, ends)
        flat = ids[0] if len(ids) == 1 else np.concatenate(ids)
        began = time.perf_counter()
        try:
            return self.runner.forward(flat, step, self.store, np.array(wanted, np.int64)), told
        finally:
            self.pass_s += time.perf_counter() - began

    def _joined(
        self, rows: Sequence[Row], passes: Sequence[tuple[np.ndarray, list[_Piece]]], failed: dict[int, Exception]
    ) -> Ran:
        """Put together what passes gave; pieces of one row follow each other."""
        first, last, begin = [-1] * len(rows), [-1] * len(rows), [row.first for row in rows]
        count = 0
        for _, told in passes:
            for piece in told:
                if first[piece.row] < 0:
                    first[piece.row], begin[piece.row] = count, piece.first
                count += piece.count
                last[piece.row] = count - 1
        parts = [logits_RV for logits_RV, _ in passes if len(logits_RV)]
        if len(parts) != 1:
            parts = [np.concatenate([np.empty((0, self.runner.spec.vocab_size), np.float32), *parts])]
        return Ran(parts[0], tuple(first), tuple(last), tuple(begin), failed)

    def _pieces(self, rows: Sequence[Row], tokens: Callable[[Row], Sequence[int]]) -> Ran:
        """Run what is whole of each row: see `fixed`."""
        found: list[list[_Piece]] = []
        answers: list[_Piece] = []
        for index, row in enumerate(rows):
            prompt, end = self._known(self._requests[row.seq]).prompt, row.first + row.count
            if row.first >= prompt:
                (answers if self._together else found.append([]) or found[-1]).append(
                    _Piece(index, row.first, row.count)
                )
                continue
            start = row.first // PIECE * PIECE
            until = end if end >= prompt else end // PIECE * PIECE
            found.append([_Piece(index, at, min(PIECE, until - at)) for at in range(start, until, PIECE)])
        if not answers:
            return self._apart(rows, found, tokens)
        try:
            before = [self._pass(rows, answers, tokens)]
        except FAULTS as error:
            return self._nothing(rows, error)
        return self._apart(rows, found, tokens, before)

    def _rewound(self, rows: Sequence[Row]) -> bool:
        """Bring the sequences of rows back to before a pass that failed; False where their caches cannot go back."""
        try:
            for row in rows:
                seq = self._seqs[row.seq]
                self.store.truncate(seq, min(row.first, seq.length))
        except TrimtabError:
            return False
        return True

    def _apart(
        self,
        rows: Sequence[Row],
        pieces: Sequence[Sequence[_Piece]],
        tokens: Callable[[Row], Sequence[int]],
        before: Sequence[tuple[np.ndarray, list[_Piece]]] = (),
    ) -> Ran:
        """Run every piece in a pass of its own; a row whose piece fails goes no further."""
        passes, failed = list(before), {}
        for some in pieces:
            try:
                made = [self._pass(rows, [piece], tokens) for piece in some]
            except FAULTS as error:
                failed[some[0].row] = error
                continue
            passes += made
        return self._joined(rows, passes, failed)

    def _nothing(self, rows: Sequence[Row], error: Exception | None) -> Ran:
        empty = np.empty((0, self.runner.spec.vocab_size), np.float32)
        none, begin = (-1,) * len(rows), tuple(row.first for row in rows)
        return Ran(empty, none, none, begin, {index: error for index in range(len(rows)) if error is not None})


class _Piece(NamedTuple):
    """Tokens of a row that run in one pass."""

    row: int
    first: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody counts values in it
