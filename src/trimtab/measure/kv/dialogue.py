"""What a task is made of: one context and the questions that follow it. Also what a generator gets to work with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import SpecError

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question about the context.

    Args:
        question: ends the user's message.
        answers: right answers; what the scorer does with several is the scorer's rule.
        scorer: name in `scorers.SCORERS`.
        max_new_tokens: most tokens of an answer.
        prefix: how the answer starts; the model continues it.
        glued: the answer follows its prefix without a space.
        lines: an answer may run over several lines; otherwise it ends with its first line.
        task: ability asked for, where a dialogue mixes several.
        rivals: answers that belong to other questions of the dialogue, for scorers that compare.
    """

    question: str
    answers: tuple[str, ...]
    scorer: str
    max_new_tokens: int
    prefix: str = ""
    glued: bool = False
    lines: bool = False
    task: str = ""
    rivals: tuple[str, ...] = ()

    @property
    def gold(self) -> str:
        """What the model is made to say when its history is golden, and what its nll is taken of."""
        text = ", ".join(self.answers) if self.scorer == "match-all" else self.answers[0]
        return text if self.glued or not self.prefix else f" {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A context and its questions, in order.

    Args:
        id: unique within its task.
        task: name of the task.
        context: what all questions are about.
        turns: the questions.
    """

    id: str
    task: str
    context: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Room:
    """How large a context may be, in tokens of one tokenizer.

    Args:
        tokens: most tokens of a context.
        tokenizer: counts them.
    """

    tokens: int
    tokenizer: Tokenizer

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text))

    def fit(self, head: str, pieces: Sequence[str], between: str) -> list[str]:
        """The first pieces that fit after a head, joined by `between`."""
        low, high = 0, len(pieces)
        while low < high:
            middle = (low + high + 1) // 2
            if self.count(head + between.join(pieces[:middle])) <= self.tokens:
                low = middle
            else:
                high = middle - 1
        return list(pieces[:low])

    def facts(self, task: str, turns: int, *, per_fact: int, least: int = 8) -> int:
        """How many facts to hide in a context: `least`, or one for every turn if those are more.

        Args:
            task: for the message.
            turns: questions, each of them about another fact.
            per_fact: tokens that a fact and some filler around it take.
            least: facts wanted where they fit.

        Raises:
            SpecError: there is no room for one fact per turn.
        """
        fits = self.tokens // per_fact
        if turns > fits:
            raise few_facts(task, self.tokens, fits, turns)
        return min(fits, max(least, turns))


def few_facts(task: str, tokens: int, facts: int, turns: int) -> SpecError:
    """The error of a task that has fewer facts than it is asked about."""
    if facts < 1:
        return SpecError(
            f"{task}: a context of {tokens} tokens has no room for a fact. Try --len {max(512, 2 * tokens)}."
        )
    allowed = f"1..{facts}" if facts > 1 else "1"
    return SpecError(
        f"{task}: a context of {tokens} tokens holds facts for {facts} questions; turns={turns} asks for more. "
        f"Allowed: {allowed}. Try --turns {facts}."
    )


#: Builds one dialogue: (random source, room, turns) -> (context, turns).
Generator = Callable[[random.Random, Room, int], tuple[str, tuple[Turn, ...]]]


def numbers(rng: random.Random, count: int, digits: int = 4) -> list[str]:
    """Different numbers of `digits` digits, none starting with 0."""
    low = 10 ** (digits - 1)
    return [str(number) for number in rng.sample(range(low, 10 * low), count)]


def scatter(rng: random.Random, room: Room, facts: list[str], filler: list[str], head: str = "") -> str:
    """Hide facts among filler sentences: each in its own stretch of the text, in the order given.

    Args:
        rng: of the places.
        room: the text fills it.
        facts: sentences to hide.
        filler: sentences, taken in order from a random one on, as often as needed.
        head: text before everything, which counts too.

    Raises:
        SpecError: the facts alone do not fit.
    """
    left = room.tokens - room.count(head) - sum(room.count(f" {fact}") for fact in facts)
    if left < 0:
        raise SpecError(
            f"{len(facts)} facts need {room.tokens - left} tokens, the context has {room.tokens}. "
            f"Try --len {2 * (room.tokens - left)}."
        )
    costs = [room.count(f" {sentence}") for sentence in filler]
    at, sentences = rng.randrange(len(filler)), []
    while costs[at % len(filler)] <= left:
        left -= costs[at % len(filler)]
        sentences.append(filler[at % len(filler)])
        at += 1
    bounds = [round(index * len(sentences) / len(facts)) for index in range(len(facts) + 1)]
    parts = []
    for fact, first, end in zip(facts, bounds, bounds[1:], strict=False):
        place = rng.randint(first, end)
        parts += [*sentences[first:place], fact, *sentences[place:end]]
    return head + " ".join(parts)
