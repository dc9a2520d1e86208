"""Requests on their way, and each answer to them: its tokens, its text, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from trimtab.runtime.engine.choosing import Chooser, Drawing, mean
from trimtab.runtime.engine.sampling import SamplingParams, StopChecker
from trimtab.runtime.text.detokenize import Stream
from trimtab.serve.engine.grammar import Matcher
from trimtab.serve.messages import FinishReason, Piece, Sampling, Submit, TokenLogprob


def drawing_of(asked: Sampling, index: int, ends: frozenset[int]) -> Drawing:
    """How choice `index` draws.

    Args:
        asked: settings of the request.
        index: its random numbers start at seed + index.
        ends: tokens that end an answer of this model.

    Raises:
        SpecError: a value outside its range.
    """
    params = SamplingParams(
        temperature=float(asked.temperature), top_k=asked.top_k, top_p=float(asked.top_p), min_p=float(asked.min_p),
        repetition_penalty=float(asked.repetition_penalty), seed=None if asked.seed is None else asked.seed + index,
    )  # fmt: skip
    held = frozenset(asked.stop_token_ids) | (frozenset() if asked.ignore_eos else ends)
    return Drawing(
        params=params, presence_penalty=asked.presence_penalty, frequency_penalty=asked.frequency_penalty,
        logit_bias=asked.logit_bias, min_tokens=asked.min_tokens, ends=held,
    )  # fmt: skip


class Choice:
    """One answer.

    Args:
        served: its request.
        index: which of the answers drawn for it.
        ends: tokens that end an answer of this model.
        stream: makes text of tokens; None = the model has no tokenizer.
        matcher: grammar, if there is one.

    Attributes:
        finish: why it ended, None while it goes on.
        logprob_sum: of its tokens, where that was asked for (`best_of`).
    """

    def __init__(
        self, served: Served, index: int, ends: frozenset[int], stream: Stream | None, matcher: Matcher | None
    ) -> None:
        asked = served.asked
        self.served, self.index = served, index
        self.chooser = Chooser(drawing_of(asked, index, ends), served.submit.prompt)
        self.matcher = matcher
        self.finish: FinishReason | None = None
        self.scores: list[float] = []
        self.pieces: list[Piece] = []  # kept until all are done, with best_of
        self.made = 0
        self._stream, self._stops = stream, StopChecker(asked.stop)
        self._ends = frozenset() if asked.ignore_eos else ends
        self._stop_ids = frozenset(asked.stop_token_ids)

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of its tokens are needed."""
        asked = self.served.asked
        return asked.logprobs is not None or asked.best_of > asked.n

    def take(self, token: int, logprob: TokenLogprob | None = None) -> Piece:
        """Add a token and return what it adds to the answer.

        Raises:
            TrimtabError: the grammar did not expect it.
        """
        asked = self.served.asked
        self.made += 1
        self.chooser.note(token)
        if logprob is not None:
            self.scores.append(logprob.logprob)
        counts = self.made >= asked.min_tokens
        text, stopped_by = "", None
        ended: FinishReason | None = None
        if token in self._stop_ids and counts:
            ended, stopped_by = "stop", token
        elif token in self._ends and counts:
            ended = "stop"
        else:
            if self.matcher is not None and self.matcher.take(token):
                ended = "stop"
            raw = "" if self._stream is None else self._stream.push(token)
            text = self._stops.push(raw) if counts else raw
        if self._stops.stopped is not None:
            ended, stopped_by = "stop", self._stops.stopped
        elif ended is None and self.made >= asked.max_tokens:
            ended = "length"
        if ended is not None and self._stops.stopped is None:
            text += self._rest()
            if self._stops.stopped is not None:
                ended, stopped_by = "stop", self._stops.stopped
        self.finish = ended
        shown = (logprob,) if logprob is not None and asked.logprobs is not None else ()
        return self._piece((token,), text, shown, stopped_by)

    def end(self, why: FinishReason) -> Piece:
        """End it without another token; what was held back of its text is let go."""
        text = "" if self._stops.stopped is not None else self._rest()
        self.finish = why
        return self._piece((), text, (), self._stops.stopped)

    def _rest(self) -> str:
        tail = "" if self._stream is None else self._stream.finish()
        return self._stops.push(tail) + self._stops.finish()

    def _piece(
        self, ids: tuple[int, ...], text: str, logprobs: tuple[TokenLogprob, ...], stopped_by: str | int | None
    ) -> Piece:
        return Piece(
            id=self.served.submit.id, choice=self.index, ids=ids, text=text, logprobs=logprobs, finish=self.finish,
            stopped_by=stopped_by,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Served:
    """A request the scheduler knows.

    Args:
        submit: as it came.
        arrived_s: when.
        choices: the answers drawn for it.
        queued_s: how long it waited; None = it still waits.
        cached_tokens: of its prompt, found in the prefix cache at its first start.
        preemptions: times it was sent back.
        failed: why it broke; empty = it did not.
        ending: how answers are to end that are still open when the scheduler lets go of it.
        prompt_logprobs: of its prompt's tokens but the first, as far as they have been run.
    """

    submit: Submit
    arrived_s: float
    choices: list[Choice] = field(default_factory=list)
    queued_s: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    failed: str = ""
    ending: FinishReason = "cancelled"
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    @property
    def asked(self) -> Sampling:
        """Its settings."""
        return self.submit.sampling

    @property
    def drawn(self) -> int:
        """Answers drawn: `n`, or those of `best_of` to choose from."""
        return max(self.asked.n, self.asked.best_of)

    @property
    def chooses(self) -> bool:
        """Whether answers are kept until the best are known."""
        return self.asked.best_of > self.asked.n

    @property
    def completion_tokens(self) -> int:
        """New tokens of all its answers."""
        return sum(choice.made for choice in self.choices)

    def best(self) -> list[Piece]:
        """The pieces of the `n` answers whose tokens have the largest mean log-probability, best first."""
        order = sorted(self.choices, key=lambda choice: (-mean(choice.scores), choice.index))
        found: list[Piece] = []
        for place, choice in enumerate(order[: self.asked.n]):
            found += [msgspec.structs.replace(piece, choice=place) for piece in choice.pieces]
        return found
