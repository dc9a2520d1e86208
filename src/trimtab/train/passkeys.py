"""Passkeys in a long text: the synthetic data that tells heads that fetch from far back apart from those that do not.

Ordinary text says almost nothing about retrieval: the next word seldom depends on what stands hundreds of tokens before.
Here the tail of every sample can be answered from the middle of it alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import SpecError

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer

#: The spelling alphabet of NATO: common words that no text puts in these orders.
NATO = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike",
    "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee",
    "zulu",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

_HEAD = "Here is a long text.\n\n"
_NEEDLE = "\nRemember this: the {nth} passkey to the vault is{words}.\n"
_QUESTION = "\n\nQuestion: What is the {nth} passkey to the vault?\nAnswer: The {nth} passkey to the vault is"


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample.

    Args:
        ids: token ids.
        tail: first token of the questions and answers, which alone are supervised.
        answers: (first, end) of the words of each answer.
    """

    ids: tuple[int, ...]
    tail: int
    answers: tuple[tuple[int, int], ...]


def passkey_sample(
    tokenizer: Tokenizer, haystack: Sequence[int], tokens: int, needles: int, words: int, rng: random.Random
) -> Sample:
    """Hide passkeys at distinct depths between 5 and 95 % of a text and ask for them in turn after it.

    Args:
        tokenizer: of the model.
        haystack: token ids of the text; a piece of it is taken from a random place.
        tokens: of the text with its needles; the questions follow.
        needles: passkeys.
        words: of each passkey.
        rng: of everything that is drawn.

    Raises:
        SpecError: the needles alone are longer than `tokens`, or a number of needles that is not possible.

    Source: Xiao et al., DuoAttention, arXiv 2410.10819, section 2.2 (there 10 passkeys of 32 words).
    """
    if not 1 <= needles <= len(ORDINALS) or words < 1:
        raise SpecError(
            f"{needles} passkeys of {words} words are not possible. Allowed: 1..{len(ORDINALS)} passkeys of 1 word or more."
        )
    keys = ["".join(f" {rng.choice(NATO)}" for _ in range(words)) for _ in range(needles)]
    planted = [tokenizer.encode(_NEEDLE.format(nth=n, words=key)) for n, key in zip(ORDINALS, keys, strict=False)]
    head = tokenizer.encode(_HEAD)
    room = tokens - len(head) - sum(map(len, planted))
    if room < 2 * needles:
        raise SpecError(
            f"{needles} passkeys of {words} words do not fit {tokens} tokens. Allowed here: {tokens - room + 2 * needles} or more."
        )
    start = rng.randrange(max(1, len(haystack) - room))
    text = [haystack[(start + i) % len(haystack)] for i in range(room)]
    places = sorted(
        rng.sample(range(round(0.05 * room), max(round(0.95 * room), round(0.05 * room) + needles)), needles)
    )
    ids = list(head)
    for piece, (first, end) in zip(planted, zip([0, *places[:-1]], places, strict=True), strict=True):
        ids += text[first:end] + piece
    ids += text[places[-1] :]
    tail, answers = len(ids), []
    for nth, key in zip(ORDINALS, keys, strict=False):
        ids += tokenizer.encode(_QUESTION.format(nth=nth))
        answer = tokenizer.encode(f"{key}.")
        answers.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return Sample(tuple(ids), tail, tuple(answers))
