"""Dialogues as token ids: the model's own chat template, cut where the context ends, a question ends, an answer ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import SpecError

if TYPE_CHECKING:
    from trimtab.measure.kv.dialogue import Dialogue, Turn
    from trimtab.runtime.text.tokenizer import Tokenizer

_CONTEXT, _QUESTION, _ANSWER, _NEXT = "@@CONTEXT@@", "@@QUESTION@@", "@@ANSWER@@", "@@NEXT@@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One turn as token ids.

    Args:
        turn: the question in words.
        question: from the end of the context, or of the answer before, to the start of the answer.
        alone: the same, right after the context.
        gold: the right answer.
    """

    turn: Turn
    question: tuple[int, ...]
    alone: tuple[int, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A dialogue as token ids.

    Args:
        dialogue: the dialogue in words.
        context: its context, template included, up to where a question would start.
        turns: its questions.
    """

    dialogue: Dialogue
    context: tuple[int, ...]
    turns: tuple[Asked, ...]

    @property
    def most_tokens(self) -> int:
        """Most tokens a sequence of this dialogue can come to."""
        return len(self.context) + sum(
            max(len(asked.question), len(asked.alone)) + max(len(asked.gold), asked.turn.max_new_tokens)
            for asked in self.turns
        )


class ChatFormat:
    """How a model wants a dialogue; without a chat template, paragraphs.

    Args:
        tokenizer: of the model.

    Raises:
        SpecError: the template drops or reorders messages.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            self.opening, self.closing, self.between = "", "\n", "\n\n"
            self._first = list(getattr(tokenizer, "prefix", ()))
            return
        rendered = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": _CONTEXT + _QUESTION},
                {"role": "assistant", "content": _ANSWER},
                {"role": "user", "content": _NEXT},
            ],
            add_generation_prompt=True,
        )
        self._first = []
        try:
            self.opening, rest = rendered.split(_CONTEXT + _QUESTION)
            _, rest = rest.split(_ANSWER)
            self.between, self.closing = rest.split(_NEXT)
        except ValueError:
            raise SpecError(
                "The chat template does not render a question, an answer and a question one after the other. "
                "Multi-turn evaluation needs that."
            ) from None

    def prompt(self, dialogue: Dialogue) -> Prompt:
        """Encode a dialogue; control tokens come from the template alone, never from its words."""
        context = [*self._first, *self._control(self.opening), *self._words(dialogue.context)]
        turns = []
        for turn in dialogue.turns:
            tail = [*self._control(self.closing), *self._words(turn.prefix)]
            alone = [*self._words(f"\n\n{turn.question}"), *tail]
            later = [*self._control(self.between), *self._words(turn.question), *tail]
            gold = tuple(self._words(turn.gold))
            turns.append(Asked(turn=turn, question=tuple(later if turns else alone), alone=tuple(alone), gold=gold))
        return Prompt(dialogue=dialogue, context=tuple(context), turns=tuple(turns))

    def _control(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, parse_special=True) if text else []

    def _words(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []
