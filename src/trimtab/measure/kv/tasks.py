"""The tasks: contexts with facts and questions about them, the same for the same seed.

The structure follows SCBench (arXiv 2412.10319) and RULER (arXiv 2404.06654), with short keys and values and text that is
always there, so that a small model can answer and nothing has to be downloaded.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import SpecError, unknown
from trimtab.measure.kv import code, ruler
from trimtab.measure.kv.dialogue import Dialogue, Generator, Room, Turn, few_facts, numbers, scatter
from trimtab.measure.kv.words import KINDS, NOISE, WORDS, essay

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer

#: Turns of a dialogue unless said otherwise, and the most there may be.
TURNS, MOST_TURNS = 5, 10
#: Tokens of an answer of one number, and what a sentence with a number and some filler around it takes.
_NUMBER_TOKENS, _PER_FACT = 10, 28


def kv(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Pairs of a word and four digits, spelt as in JSON; each turn asks for the value of one key (Retr.KV)."""
    count = room.facts("kv", turns, per_fact=_PER_FACT)
    keys, values = rng.sample(WORDS, count), numbers(rng, count)
    facts = [f'"{key}": "{value}",' for key, value in zip(keys, values, strict=True)]
    head = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    context = scatter(rng, room, facts, list(NOISE), head)
    asked = rng.sample(range(count), turns)
    return context, tuple(
        Turn(
            question=f'Key: "{keys[index]}"\nThe value associated with the specified key is:',
            prefix=f'"{keys[index]}": "',
            answers=(values[index],),
            scorer="substring",
            max_new_tokens=_NUMBER_TOKENS,
            glued=True,
            task="kv",
        )
        for index in asked
    )


def needles(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Sentences with a magic number hidden in prose, one for each turn (passkey retrieval)."""
    room.facts("needles", turns, per_fact=2 * _PER_FACT)
    keys, values = rng.sample(WORDS, turns), numbers(rng, turns)
    facts = [f"The special magic number for {key} is: {value}." for key, value in zip(keys, values, strict=True)]
    head = "Special magic numbers are hidden in the following text. Remember them, I will ask for them afterwards.\n\n"
    context = scatter(rng, room, facts, list(essay()), head)
    order = rng.sample(range(turns), turns)
    return context, tuple(_needle(keys[index], values[index]) for index in order)


def _needle(key: str, value: str) -> Turn:
    return Turn(
        question=f"What is the special magic number for {key}?",
        prefix=f"The special magic number for {key} is:",
        answers=(value,),
        scorer="first-integer",
        max_new_tokens=_NUMBER_TOKENS,
        task="needles",
    )


def prefix_suffix(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Strings of two words around a number; a turn gives both ends, which other strings share one of (Retr.Prefix-Suffix)."""
    count = room.facts("prefix_suffix", turns, per_fact=_PER_FACT)
    heads, tails = rng.sample(WORDS, count), rng.sample(WORDS, count)
    # Every second string shares its first word with the one before, every third its last word.
    heads = [heads[index - 1] if index % 2 else heads[index] for index in range(count)]
    tails = [tails[index - 2] if index % 3 == 2 else tails[index] for index in range(count)]
    values = numbers(rng, count)
    strings = [f"{head}-{value}-{tail}" for head, value, tail in zip(heads, values, tails, strict=True)]
    head = "Below is a list of strings.\n\n"
    context = scatter(rng, room, [f"String: {string}." for string in strings], list(NOISE), head)
    asked = rng.sample(range(count), turns)
    return context, tuple(
        Turn(
            question=f"Which string starts with '{heads[index]}' and ends with '{tails[index]}'?",
            prefix="String:",
            answers=(strings[index],),
            scorer="substring",
            max_new_tokens=24,
            task="prefix_suffix",
        )
        for index in asked
    )


def multihop(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Chains of assignments over two hops; a turn asks for all variables that hold a value (Retr.MultiHop)."""
    hops = 2
    chains = max(2, turns)
    fits = min(room.tokens // ((hops + 1) * _PER_FACT), 24 // (hops + 1))
    if chains > fits:
        raise few_facts("multihop", room.tokens, fits, turns)
    names = rng.sample([a + b for a in "ABCDEFGHJK" for b in "LMNPQRSTUV"], chains * (hops + 1))
    values = numbers(rng, chains, digits=5)
    held = [names[chain * (hops + 1) : (chain + 1) * (hops + 1)] for chain in range(chains)]
    waiting = [
        [
            f"VAR {own[0]} = {value}.",
            *(f"VAR {name} = VAR {before}." for before, name in itertools.pairwise(own)),
        ]
        for own, value in zip(held, values, strict=True)
    ]
    facts = []
    while any(waiting):  # chains mix, each in its own order
        facts.append(rng.choice([chain for chain in waiting if chain]).pop(0))
    head = "Remember the assignments of variables hidden in the text below.\n\n"
    context = scatter(rng, room, facts, list(NOISE), head)
    order = rng.sample(range(chains), turns)
    return context, tuple(
        Turn(
            question=f"Find all variables that hold the value {values[chain]}, directly or through other variables.",
            prefix=f"The {hops + 1} variables that hold the value {values[chain]} are:",
            answers=tuple(held[chain]),
            scorer="match-all",
            max_new_tokens=30,
            task="multihop",
        )
        for chain in order
    )


_FINDS = (
    ("largest number", lambda found: found[-1]),
    ("smallest number", lambda found: found[0]),
    ("second largest number", lambda found: found[-2]),
    ("second smallest number", lambda found: found[1]),
    ("median of the numbers", lambda found: found[len(found) // 2]),
    ("third largest number", lambda found: found[-3]),
    ("third smallest number", lambda found: found[2]),
)


def mf(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """A list of three-digit numbers; a turn asks for the largest, the smallest and so on (Math.Find)."""
    if turns > len(_FINDS):
        raise few_facts("mf", room.tokens, len(_FINDS), turns)
    head = "Here is a list of numbers.\n\n"
    values = numbers(rng, 899, digits=3)
    count = len(room.fit(head, values, ", "))
    count -= 1 - count % 2  # odd: the median is one of them
    if count < 9:
        raise few_facts("mf", room.tokens, 0, turns)
    found = [int(value) for value in values[:count]]
    ordered = sorted(found)
    return head + ", ".join(str(value) for value in found), tuple(
        Turn(
            question=f"What is the {what} in the list above?",
            prefix=f"The {what} is",
            answers=(str(pick(ordered)),),
            scorer="first-integer",
            max_new_tokens=5,
            task="mf",
        )
        for what, pick in _FINDS[:turns]
    )


def manyshot(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Words with labels that stand for kinds of things; a turn asks for the label of a new word (ICL.ManyShot)."""
    labels = dict(zip(rng.sample(sorted(KINDS), len(KINDS)), ("red", "blue", "green", "black"), strict=True))
    items = [(word, label) for kind, label in labels.items() for word in KINDS[kind]]
    rng.shuffle(items)
    fresh, shown = items[:turns], items[turns:]
    head = "Each word has a label.\n\n"
    lines = room.fit(head, [f"Word: {word}\nLabel: {label}" for word, label in shown], "\n\n")
    if len(lines) < 2 * len(KINDS):
        raise few_facts("manyshot", room.tokens, 0, turns)
    return head + "\n\n".join(lines), tuple(
        Turn(
            question=f"Word: {word}\nWhich label?",
            prefix="Label:",
            answers=(label,),
            scorer="contained",
            max_new_tokens=10,
            task="manyshot",
        )
        for word, label in fresh
    )


def mix(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Needles in prose and pairs of a word and a number in one context, asked for in turn (Mix)."""
    half = Room(room.tokens // 2, room.tokenizer)
    first, second = (turns + 1) // 2, max(1, turns // 2)
    prose, hidden = needles(rng, half, first)
    pairs, looked_up = kv(rng, half, second)
    merged = [turn for both in zip(hidden, [*looked_up, None], strict=False) for turn in both if turn]
    return f"{prose}\n\n{pairs}", tuple(merged[:turns])


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task that can be built here, or that needs the user's file.

    Args:
        ability: what it tests.
        build: its generator; None if it needs data.
        turns: most questions about one context.
    """

    ability: str
    build: Generator | None
    turns: int = MOST_TURNS


TASKS: dict[str, Task] = {
    "kv": Task(ability="string retrieval", build=kv),
    "prefix_suffix": Task(ability="string retrieval", build=prefix_suffix),
    "multihop": Task(ability="string retrieval", build=multihop, turns=8),
    "needles": Task(ability="string retrieval", build=needles),
    "repoqa": Task(ability="semantic retrieval", build=code.repoqa),
    "mf": Task(ability="global information", build=mf, turns=len(_FINDS)),
    "manyshot": Task(ability="global information", build=manyshot),
    "mix": Task(ability="several at once", build=mix),
    "niah_single": Task(ability="string retrieval", build=ruler.niah_single, turns=1),
    "niah_multikey": Task(ability="string retrieval", build=ruler.niah_multikey),
    "niah_multivalue": Task(ability="string retrieval", build=ruler.niah_multivalue),
    "niah_multiquery": Task(ability="string retrieval", build=ruler.niah_multiquery),
    "common_words": Task(ability="global information", build=ruler.common_words, turns=1),
    "en_sum": Task(ability="global information", build=None),
    "en_qa": Task(ability="semantic retrieval", build=None),
    "zh_qa": Task(ability="semantic retrieval", build=None),
    "en_choice": Task(ability="semantic retrieval", build=None),
}


def find_task(name: str) -> Task:
    """Return a task.

    Raises:
        SpecError: no task has this name.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def dialogues(
    name: str, tokenizer: Tokenizer, *, tokens: int, turns: int | None = None, count: int, seed: int
) -> list[Dialogue]:
    """Build the dialogues of a task; the same arguments give the same dialogues.

    Args:
        name: of the task.
        tokenizer: counts the tokens of a context.
        tokens: most tokens of a context.
        turns: questions about each; None = 5, or as many as the task has.
        count: dialogues.
        seed: of words, numbers and places.

    Raises:
        SpecError: unknown task, one that needs data, more turns than facts, or a context too short.
    """
    task = find_task(name)
    if task.build is None:
        raise SpecError(f"{name} needs text that does not come with Trimtab. Give its file with --data FILE.jsonl.")
    if turns is not None and not 1 <= turns <= MOST_TURNS:
        raise SpecError(f"turns={turns} is not possible. Allowed: 1..{MOST_TURNS}. Try --turns {TURNS}.")
    if turns is not None and turns > task.turns:
        raise few_facts(name, tokens, task.turns, turns)
    if tokens < 64:
        raise SpecError(f"A context of {tokens} tokens is too short for {name}. Allowed: 64 or more. Try --len 512.")
    room, built = Room(tokens, tokenizer), []
    for index in range(count):
        rng = random.Random(f"{name}/{tokens}/{seed}/{index}")
        context, asked = task.build(rng, room, min(TURNS, task.turns) if turns is None else turns)
        built.append(Dialogue(id=f"{name}-{tokens}-{seed}-{index}", task=name, context=context, turns=asked))
    return built
