"""A conversation: what has been said stays in the cache, so that every turn runs only what is new. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import NotRewindable, SpecError
from trimtab.runtime.engine.choosing import Chooser, Drawing, Wish, choose
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.engine.generator import Generator as Model
from trimtab.runtime.engine.sampling import SamplingParams, StopChecker
from trimtab.spec.nodes import NO_FLOW


@dataclass(slots=True)
class Turn:
    """What an answer took.

    Args:
        prompt_tokens: of the conversation up to the answer.
        run_tokens: of these, not in the cache yet.
        new_tokens: of the answer.
        prompt_s, answer_s: seconds of both.
        finish: ``length``, ``eos``, ``stop``, or ``interrupted``.
    """

    prompt_tokens: int = 0
    run_tokens: int = 0
    new_tokens: int = 0
    prompt_s: float = 0.0
    answer_s: float = 0.0
    finish: str = ""


class Talk:
    """A conversation with one model, one turn after the other.

    Args:
        model: with a tokenizer; its chat template is used, and without one texts follow each other as they are.
        params: how answers are drawn; random numbers go on from turn to turn.
        system: what the model is told first; empty = what its template says by itself.

    Attributes:
        messages: so far, the system's included.
        turn: what the newest answer took.

    Raises:
        SpecError: no tokenizer, or a model that leaves tokens of a prompt out.
    """

    def __init__(self, model: Model, params: SamplingParams, system: str = "") -> None:
        if model.spec.flow != NO_FLOW:
            raise SpecError(
                f"{model.spec.name} leaves tokens of a prompt out, so its cache does not follow a conversation. Use `trimtab run`."
            )
        self._model, self._params, self._system = model, params, system
        self._tokenizer = model.tokenizer
        self._rng = params.rng()
        self._session: Session | None = None
        self.turn = Turn()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.close()
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self._system}] if self._system else []
        self._ids: list[int] = []  # in the cache
        self._text = ""  # that these ids, and an end token that was drawn but not run, stand for; empty = not known

    def close(self) -> None:
        """Free the cache."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def say(self, text: str, going: Callable[[], bool] = lambda: True) -> Iterator[str]:
        """Say something and yield the answer in pieces.

        Args:
            text: of the user.
            going: asked before every pass; False ends the answer where it is, and the conversation can go on.

        Raises:
            SpecError: the conversation is longer than the context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt, rendered = self._prompt(asked)
        room = self._model.spec.max_position_embeddings - len(prompt)
        if room < 1:
            raise SpecError(
                f"The conversation has {len(prompt)} tokens, the context of {self._model.spec.name} is "
                f"{self._model.spec.max_position_embeddings}. Start anew with /reset."
            )
        most = min(self._params.max_new_tokens, room)
        self.turn = turn = Turn(prompt_tokens=len(prompt), finish="interrupted")
        session, known = self._rewound(prompt)
        turn.run_tokens = len(prompt) - known
        began = time.perf_counter()
        self._text = ""  # until the answer is whole
        try:
            logits = session.append(prompt[known:], most, going)
        finally:
            self._ids = prompt[: session.lengths[0] if session.lengths else 0]
        turn.prompt_s = time.perf_counter() - began
        if len(self._ids) < len(prompt):
            return
        answer = yield from self._answer(session, logits, most, going)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        if turn.finish != "stop":  # of a stop text, tokens hold more than was said
            self._text = rendered + answer

    def _answer(
        self, session: Session, logits: NDArray[np.float32], most: int, going: Callable[[], bool]
    ) -> Generator[str, None, str]:
        """Draw an answer, yield its text in pieces, return it whole."""
        turn, params = self.turn, self._params
        chooser = Chooser(Drawing(params=params), self._ids, self._rng)
        stream, stops = self._tokenizer.stream(), StopChecker(params.stop)
        ends = frozenset() if params.ignore_eos else self._tokenizer.eog_ids
        said: list[str] = []
        began = time.perf_counter()
        while going():
            token = choose(logits, [Wish(0, chooser)])[0]
            if isinstance(token, Exception):
                raise token
            chooser.note(token)
            turn.new_tokens += 1
            turn.answer_s = time.perf_counter() - began
            if token in ends:
                turn.finish = "eos"
                break
            piece = stops.push(stream.push(token))
            if piece:
                said.append(piece)
                yield piece
            if stops.stopped is not None:
                turn.finish = "stop"
                break
            if turn.new_tokens >= most:
                turn.finish = "length"
            logits = session.decode([token])  # the last one, too: the next turn goes on behind it
            self._ids.append(token)
            if turn.finish == "length":
                break
        if stops.stopped is None:
            rest = stops.push(stream.finish())
            if stops.stopped is None:
                rest += stops.finish()
            else:
                turn.finish = "stop"
            if rest:
                said.append(rest)
                yield rest
        turn.answer_s = time.perf_counter() - began
        return "".join(said)

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], str]:
        """Token ids of a conversation and their text; what is in the cache keeps its ids, however else it could be cut into tokens."""
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(messages)
        else:
            text = "\n".join(message["content"] for message in messages) + "\n"
        if self._text and text.startswith(self._text):
            new = self._tokenizer.encode(text[len(self._text) :], parse_special=True)
            if new:
                return [*self._ids, *new], text
        if self._tokenizer.chat_template:
            return self._tokenizer.encode(text, parse_special=True), text
        return self._tokenizer.encode(text, add_special_tokens=True), text

    def _rewound(self, prompt: list[int]) -> tuple[Session, int]:
        """The session, cut back to what it has in common with a prompt, and how many tokens that is."""
        if self._session is None:
            self._session, self._ids = Session(self._model.runner()), []
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, prompt, strict=False)))
        known = min(known, len(prompt) - 1)  # logits come from a token that is run
        if known < len(self._ids):
            try:
                self._session.cut(known)
            except NotRewindable:  # what was coded or given up cannot be had back: all is run again
                self._session.close()
                self._session, known = Session(self._model.runner()), 0
        self._ids = self._ids[:known]
        return self._session, known
