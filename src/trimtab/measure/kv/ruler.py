"""Generators after RULER (arXiv 2404.06654): needles with several keys, values or queries, and the most common words."""

from __future__ import annotations

import random

from trimtab.measure.kv.dialogue import Room, Turn, few_facts, numbers, scatter
from trimtab.measure.kv.words import NOISE, WORDS, essay

_HEAD = "Some special magic numbers are hidden in the following text. Memorize them, I will quiz you about them.\n\n"
_PER_FACT = 32
#: Values of a key, and keys of a query.
_SEVERAL = 3
#: How many words are common, and how many times as often they occur as any other one.
_COMMON, _OFTEN = 3, 8


def _sentence(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def niah_single(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """One needle in plain sentences, one question."""
    key, value = rng.choice(WORDS), numbers(rng, 1)[0]
    context = scatter(rng, room, [_sentence(key, value)], list(NOISE), _HEAD)
    return context, (_one(key, value),) * turns


def niah_multikey(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Many needles in prose; each turn asks for one of them."""
    count = room.facts("niah_multikey", turns, per_fact=_PER_FACT)
    keys, values = rng.sample(WORDS, count), numbers(rng, count)
    facts = [_sentence(key, value) for key, value in zip(keys, values, strict=True)]
    context = scatter(rng, room, facts, list(essay()), _HEAD)
    return context, tuple(_one(keys[index], values[index]) for index in rng.sample(range(count), turns))


def niah_multivalue(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Keys with three numbers each; a turn asks for all numbers of one key."""
    fits = min(room.tokens // (_SEVERAL * _PER_FACT), 10)
    if turns > fits:
        raise few_facts("niah_multivalue", room.tokens, fits, turns)
    keys, values = rng.sample(WORDS, turns), numbers(rng, turns * _SEVERAL)
    owned = {key: values[index * _SEVERAL : (index + 1) * _SEVERAL] for index, key in enumerate(keys)}
    facts = [(key, value) for key, own in owned.items() for value in own]
    rng.shuffle(facts)
    context = scatter(rng, room, [_sentence(key, value) for key, value in facts], list(essay()), _HEAD)
    # As they stand in the text: the order a model would name them in.
    order = {key: tuple(value for name, value in facts if name == key) for key in keys}
    return context, tuple(
        _several(f"What are all the special magic numbers for {key}?", f"The special magic numbers for {key} are:", own)
        for key, own in order.items()
    )


def niah_multiquery(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Many needles; a turn asks for three of them at once."""
    count = room.facts("niah_multiquery", max(turns, _SEVERAL), per_fact=_PER_FACT)
    keys, values = rng.sample(WORDS, count), numbers(rng, count)
    facts = [_sentence(key, value) for key, value in zip(keys, values, strict=True)]
    context = scatter(rng, room, facts, list(essay()), _HEAD)
    asked = []
    for _ in range(turns):
        chosen = rng.sample(range(count), _SEVERAL)
        named = f"{', '.join(keys[index] for index in chosen[:-1])} and {keys[chosen[-1]]}"
        asked.append(
            _several(
                f"What are the special magic numbers for {named}?",
                f"The special magic numbers for {named} are:",
                tuple(values[index] for index in chosen),
            )
        )
    return context, tuple(asked)


def common_words(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """A shuffled list in which three words are far more common than all others; they are asked for."""
    head = "Below is a numbered list of words. Some words appear more often than others.\n\n"
    places = len(room.fit(head, [f"{index + 1}. screwdriver" for index in range(room.tokens)], " "))
    seldom = 1
    while places // seldom - _COMMON * _OFTEN > len(WORDS) - _COMMON:
        seldom += 1
    others = places // seldom - _COMMON * _OFTEN
    if others < _COMMON:
        raise few_facts("common_words", room.tokens, 0, turns)
    words = rng.sample(WORDS, _COMMON + others)
    listed = [*words[:_COMMON] * (_OFTEN * seldom), *words[_COMMON:] * seldom]
    rng.shuffle(listed)
    text = " ".join(f"{index + 1}. {word}" for index, word in enumerate(listed))
    turn = Turn(
        question=f"What are the {_COMMON} most common words in the list above?",
        prefix=f"The {_COMMON} most common words in the list are:",
        answers=tuple(words[:_COMMON]),
        scorer="match-all",
        max_new_tokens=30,
        task="common_words",
    )
    return head + text, (turn,) * turns


def _one(key: str, value: str) -> Turn:
    return Turn(
        question=f"What is the special magic number for {key} mentioned in the text?",
        prefix=f"The special magic number for {key} mentioned in the text is:",
        answers=(value,),
        scorer="first-integer",
        max_new_tokens=10,
        task="niah",
    )


def _several(question: str, prefix: str, answers: tuple[str, ...]) -> Turn:
    return Turn(
        question=question, prefix=prefix, answers=answers, scorer="match-all", max_new_tokens=32, task="niah_several"
    )
