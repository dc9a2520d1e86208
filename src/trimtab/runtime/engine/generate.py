"""Generation over any runner: chunked prompt, decode steps, sampling, stop strings. No torch.

Legend: B rows, T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.engine.sampling import SamplingParams, StopChecker, sample
from trimtab.runtime.step import IntArray, Recorder, Step
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.runtime.cache.store import KVStore, Seq
    from trimtab.runtime.text.tokenizer import Tokenizer

#: New tokens of each row in one pass over a prompt.
CHUNK = 512


class Runner(Protocol):
    """What the engine drives: a decoder or a native program."""

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        ...

    def open_store(self) -> KVStore:
        """An empty store that fits the model."""
        ...

    def forward(self, tokens: IntArray, step: Step, store: KVStore, logits_rows: IntArray) -> np.ndarray:
        """Run one pass over packed tokens [T]; float32 logits [R, V] of the rows wanted."""
        ...

    def keep_tokens(self, ids: IntArray, record: Recorder | None) -> IntArray:
        """Indices of the prompt tokens to prefill; all of them without a token filter."""
        ...


def check_context(spec: ModelSpec, prompt: int, new: int) -> None:
    """Refuse what does not fit the positions of a model.

    Raises:
        SpecError: `prompt` and `new` tokens together are more than its context.
    """
    context = spec.max_position_embeddings
    if prompt + new > context:
        raise SpecError(
            f"A prompt of {prompt} tokens and {new} new ones exceed the context of {spec.name}, {context}. "
            f"Shorten the prompt or generate at most {max(context - prompt, 0)}."
        )


class Session:
    """Some sequences on their way: prefill once, then any number of steps.

    Args:
        runner: the model.
        chunk: new tokens of each row in one pass over a prompt.

    Attributes:
        store: holds keys and values; `store.nbytes()` tells what they take.
        record: set to a Recorder to meter the passes that follow.
        lengths: tokens seen of each row, after a token filter.

    Raises:
        SpecError: a chunk of no token.
    """

    def __init__(self, runner: Runner, *, chunk: int = CHUNK) -> None:
        if chunk < 1:
            raise SpecError(f"chunk={chunk} is not possible. Allowed: 1 or more. Try chunk={CHUNK}.")
        self.runner, self.chunk = runner, chunk
        self.store = runner.open_store()
        self.record: Recorder | None = None
        self.seqs: list[Seq] = []
        self.lengths: list[int] = []
        self._reach: list[int] = []
        self._prompts: list[int] = []

    def prefill(self, prompts: Sequence[Sequence[int] | IntArray], reserve: int = 0) -> np.ndarray:
        """Run the prompts of all rows side by side, in chunks, and return the logits after each [B, V].

        Args:
            prompts: token ids of each row; lengths may differ.
            reserve: tokens that will follow; their pages are taken now.

        Raises:
            CapacityError: the cache does not fit.
            SpecError: the session has been prefilled already, a prompt is empty, or prompt and reserve exceed the context.
        """
        if self.seqs:
            raise SpecError("This session holds a prompt already. Open another one.")
        rows = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        if not rows or min(len(row) for row in rows) == 0:
            raise SpecError("A prompt has no token. Give at least one.")
        check_context(self.runner.spec, max(len(row) for row in rows), reserve)
        rows = [row[self.runner.keep_tokens(row, self.record)] for row in rows]
        self.seqs = [self.store.open(reserve_tokens=len(row) + reserve) for row in rows]
        self.lengths, self._reach = [0] * len(rows), [len(row) + reserve for row in rows]
        self._prompts = [len(row) for row in rows]
        logits: list[np.ndarray | None] = [None] * len(rows)
        while any(done < len(row) for done, row in zip(self.lengths, rows, strict=True)):
            pieces = [row[done : done + self.chunk] for done, row in zip(self.lengths, rows, strict=True)]
            active = [index for index, piece in enumerate(pieces) if len(piece)]
            last = [index for index in active if self.lengths[index] + len(pieces[index]) == len(rows[index])]
            found = self._forward(active, [pieces[index] for index in active], last)
            for index, row_V in zip(last, found, strict=True):
                logits[index] = row_V
        return np.stack([row_V for row_V in logits if row_V is not None])

    def decode(self, tokens: Sequence[int] | IntArray) -> np.ndarray:
        """Append one token to every row and return the logits after it [B, V].

        Raises:
            SpecError: not one token for each row, or the context is full.
            CapacityError: the cache is full.
        """
        every = list(range(len(self.seqs)))
        return self._forward(every, [np.array([token], dtype=np.int64) for token in tokens], every)

    def extend(self, pieces: Sequence[Sequence[int] | IntArray]) -> np.ndarray:
        """Append given tokens to every row in one pass and return the logits after each of them [T, V], packed."""
        every = list(range(len(self.seqs)))
        arrays = [np.asarray(piece, dtype=np.int64) for piece in pieces]
        return self._forward(every, arrays, None)

    def append(
        self, piece: Sequence[int] | IntArray, reserve: int = 0, going: Callable[[], bool] | None = None
    ) -> np.ndarray:
        """Run further prompt tokens behind the only row, in chunks, and return the logits after them [1, V].

        Args:
            piece: token ids, at least one.
            reserve: tokens that will follow.
            going: asked before every chunk; False ends it early, and the logits are those after the chunk before.

        Raises:
            SpecError: more rows than one, no token, or prompt and reserve exceed the context.
            CapacityError: the cache is full.
        """
        ids = np.asarray(piece, dtype=np.int64)
        if len(self.seqs) > 1 or len(ids) == 0:
            raise SpecError("append takes at least one token for a session of one row.")
        if not self.seqs:
            self.seqs, self.lengths, self._reach, self._prompts = [self.store.open()], [0], [0], [0]
        end = self.lengths[0] + len(ids)
        check_context(self.runner.spec, end, reserve)
        self._reach[0], self._prompts[0] = end + reserve, end
        logits = np.empty((0, self.runner.spec.vocab_size), np.float32)
        for at in range(0, len(ids), self.chunk):
            if going is not None and not going():
                break
            logits = self._forward([0], [ids[at : at + self.chunk]], [0])
        return logits

    def cut(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of the only row.

        Raises:
            NotRewindable: its cache cannot go back.
            SpecError: more tokens than it has.
        """
        self.store.truncate(self.seqs[0], tokens)
        self.lengths[0] = tokens

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Free all rows but these; the rest keep their order."""
        for index, seq in enumerate(self.seqs):
            if index not in rows:
                self.store.free(seq)
        self.seqs = [self.seqs[index] for index in rows]
        self.lengths = [self.lengths[index] for index in rows]
        self._reach = [self._reach[index] for index in rows]
        self._prompts = [self._prompts[index] for index in rows]

    def end_turn(self) -> None:
        """Tell that the answers are complete: policies that act between turns do so now."""
        for seq in self.seqs:
            self.store.end_turn(seq)

    def close(self) -> None:
        """Free the sequences."""
        for seq in self.seqs:
            self.store.free(seq)
        self.seqs, self.lengths, self._reach, self._prompts = [], [], [], []

    def _forward(self, active: list[int], pieces: list[IntArray], last: list[int] | None) -> np.ndarray:
        """One pass over `pieces` of the rows `active`; logits after the last token of the rows `last` (None = all)."""
        if len(pieces) != len(active) or min((len(piece) for piece in pieces), default=0) == 0:
            raise SpecError(f"A step takes at least one token for each of the {len(active)} rows. Prefill first.")
        new = [len(piece) for piece in pieces]
        past = [self.lengths[index] for index in active]
        for earlier, more in zip(past, new, strict=True):
            check_context(self.runner.spec, earlier, more)
        reach = [self._reach[index] for index in active]
        ends = [
            earlier < self._prompts[index] <= earlier + more
            for index, earlier, more in zip(active, past, new, strict=True)
        ]
        step = Step.of(new, past, [self.seqs[index] for index in active], self.record, reach, ends)
        if last is None:
            wanted = np.arange(int(step.cu[-1]), dtype=np.int64)
        else:
            wanted = np.array([step.cu[active.index(index) + 1] - 1 for index in last], dtype=np.int64)
        logits = self.runner.forward(np.concatenate(pieces), step, self.store, wanted)
        for index, count in zip(active, new, strict=True):
            self.lengths[index] += count
        return logits


@dataclass(frozen=True, slots=True)
class Output:
    """What was generated for one prompt.

    Args:
        text: generated text, without stop strings (empty when the model has no tokenizer).
        ids: generated token ids, the end token included if one came.
        prompt_tokens: tokens of the prompt as given.
        finish: ``length``, ``eos`` or ``stop``.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    finish: str


class _Row:
    """Progress of one prompt."""

    def __init__(self, prompt: IntArray, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.prompt, self.params, self.tokenizer = prompt, params, tokenizer
        self.ids: list[int] = []
        self.text, self.finish = "", ""
        self.rng = params.rng()
        self.stream = tokenizer.stream() if tokenizer else None
        self.stops = StopChecker(params.stop)
        self.ends = frozenset() if params.ignore_eos or tokenizer is None else tokenizer.eog_ids

    def take(self, token: int) -> None:
        """Add a token, its text, and find out whether the row is done."""
        self.ids.append(token)
        if token in self.ends:
            self.finish = "eos"
        elif len(self.ids) >= self.params.max_new_tokens:
            self.finish = "length"
        if self.stream is None:
            return
        text = "" if token in self.ends else self.stream.push(token)
        if self.finish:
            text += self.stream.finish()
        self.text += self.stops.push(text)
        if self.stops.stopped is not None:
            self.finish = "stop"
        elif self.finish:
            self.text += self.stops.finish()

    @property
    def output(self) -> Output:
        return Output(self.text, tuple(self.ids), len(self.prompt), self.finish or "length")


def generate(
    runner: Runner, prompts: Sequence[IntArray], params: SamplingParams, tokenizer: Tokenizer | None
) -> Iterator[list[Output]]:
    """Continue several prompts side by side; yield the outputs so far after every step, the last time complete.

    A row that is done leaves the batch; the others go on. Sequences are freed at the end, also after an exception or when
    the caller stops listening.

    Raises:
        SpecError: no prompt, an empty one, or prompt plus new tokens exceed the context: now, before anything is computed.
    """
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise SpecError("A prompt has no token. Give at least one.")
    check_context(runner.spec, max(len(prompt) for prompt in prompts), params.max_new_tokens)
    return _steps(runner, prompts, params, tokenizer)


def _steps(
    runner: Runner, prompts: Sequence[IntArray], params: SamplingParams, tokenizer: Tokenizer | None
) -> Iterator[list[Output]]:
    rows = [_Row(prompt, params, tokenizer) for prompt in prompts]
    session = Session(runner)
    try:
        logits = session.prefill(prompts, reserve=params.max_new_tokens)
        active = rows
        while True:
            seen = [np.concatenate((row.prompt, row.ids)).astype(np.int64) for row in active]
            tokens = sample(logits, [row.params for row in active], seen, [row.rng for row in active])
            for row, token in zip(active, tokens.tolist(), strict=True):
                row.take(token)
            yield [row.output for row in rows]
            going = [index for index, row in enumerate(active) if not row.finish]
            if not going:
                return
            session.keep_rows(going)
            active = [active[index] for index in going]
            logits = session.decode([row.ids[-1] for row in active])
    finally:
        session.close()
