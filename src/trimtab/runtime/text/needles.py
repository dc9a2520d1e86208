"""Needle prompts: a number hidden in a long text and a question about it at the end.

Used to find a technique's layer (calibration) and to grade what a technique forgets. Numbers are digits, which
byte-level tokenizers split one by one, so an answer can be graded digit by digit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import SpecError

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer

_NOISE = "The door is open. The lamp is warm. The road is long. We walk there. We come back again. "
_MARK = "@@HAYSTACK@@"
_ASK = (
    "A special magic number is hidden in the following text. Remember it, I will ask for it afterwards.\n\n"
    f"{_MARK}\n\nWhat is the special magic number for {{key}}?"
)
_NEEDLE = " The special magic number for {key} is: {number}. "
_ANSWER = "The special magic number for {key} is:"
_KEYS = (
    "amber", "basalt", "cedar", "dune", "ember", "fjord", "garnet", "harbor", "indigo", "jasper", "kelp", "lagoon",
    "maple", "nectar", "onyx", "pebble", "quartz", "ridge", "saffron", "tundra", "umber", "velvet", "willow", "zephyr",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedlePrompt:
    """One prompt with its answer.

    Args:
        ids: prompt tokens, up to the answer prefix.
        answer: text of the number.
        answer_ids: tokens that follow if the answer is right.
        needle: (first, end) token positions of the sentence that holds the number.
        number: (first, end) token positions of the digits alone.
        depth: where the sentence stands, 0 = start of the haystack, 1 = its end.
    """

    ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    needle: tuple[int, int]
    number: tuple[int, int]
    depth: float


def needle_prompts(
    tokenizer: Tokenizer,
    *,
    tokens: int,
    count: int,
    seed: int,
    haystack: str | None = None,
    digits: int = 4,
) -> list[NeedlePrompt]:
    """Build `count` prompts of `tokens` tokens each; needle depths are spread evenly, haystacks start at random places.

    Args:
        tokenizer: of the model; its chat template wraps the prompt when it has one.
        tokens: length of each prompt.
        count: prompts.
        seed: of keys, numbers and places.
        haystack: prose to hide the needle in; None = repeated plain sentences.
        digits: of the number.

    Raises:
        SpecError: `tokens` leaves no room for a haystack.
    """
    rng = random.Random(seed)
    hay_ids = tokenizer.encode(haystack or _NOISE * (tokens // 16 + 2))
    return [_prompt(tokenizer, hay_ids, tokens, (index + 0.5) / count, rng, digits) for index in range(count)]


def _prompt(
    tokenizer: Tokenizer, hay: list[int], tokens: int, depth: float, rng: random.Random, digits: int
) -> NeedlePrompt:
    key = rng.choice(_KEYS)
    answer = "".join(rng.choice("0123456789") for _ in range(digits))
    question = _ASK.format(key=key)
    if tokenizer.chat_template:
        question = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    head, tail = question.split(_MARK)
    head_ids = tokenizer.encode(head, parse_special=True)
    tail_ids = tokenizer.encode(tail + _ANSWER.format(key=key), parse_special=True)
    before, after = _NEEDLE.split("{number}")
    pieces = [
        tokenizer.encode(before.format(key=key).rstrip()),
        tokenizer.encode(" " + answer),
        tokenizer.encode(after),
    ]
    needle_ids = [token for piece in pieces for token in piece]
    room = tokens - len(head_ids) - len(tail_ids) - len(needle_ids)
    if room < 8:
        raise SpecError(f"A needle prompt of {tokens} tokens leaves no haystack. Allowed: {tokens - room + 8} or more.")
    start = rng.randrange(max(1, len(hay) - room))
    text = [hay[(start + i) % len(hay)] for i in range(room)]
    place = round(depth * room)
    first = len(head_ids) + place
    digits_at = first + len(pieces[0])
    return NeedlePrompt(
        ids=tuple(head_ids + text[:place] + needle_ids + text[place:] + tail_ids),
        answer=answer,
        answer_ids=tuple(tokenizer.encode(" " + answer)),
        needle=(first, first + len(needle_ids)),
        number=(digits_at, digits_at + len(pieces[1])),
        depth=depth,
    )
