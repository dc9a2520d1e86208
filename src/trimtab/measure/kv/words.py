"""Words and sentences the generators draw on. All of it is made here or comes with CPython."""

from __future__ import annotations

import functools
import re

#: Things by kind; a word belongs to one kind only.
KINDS: dict[str, tuple[str, ...]] = {
    "animal": (
        "badger", "beaver", "camel", "cheetah", "donkey", "eagle", "falcon", "ferret", "giraffe", "goat", "hamster",
        "heron", "horse", "jaguar", "leopard", "lizard", "monkey", "moose", "otter", "panther", "parrot", "penguin",
        "rabbit", "raven", "salmon", "spider", "squirrel", "tiger", "turtle", "walrus", "whale", "zebra",
    ),
    "food": (
        "apple", "apricot", "banana", "bread", "butter", "cabbage", "carrot", "cheese", "cherry", "coconut", "ginger",
        "grape", "honey", "lemon", "lettuce", "mango", "melon", "mushroom", "noodle", "olive", "onion", "orange",
        "papaya", "pasta", "peanut", "pepper", "potato", "pumpkin", "radish", "spinach", "tomato", "walnut",
    ),
    "tool": (
        "anvil", "axe", "broom", "bucket", "chisel", "clamp", "compass", "crowbar", "drill", "hammer", "hatchet",
        "hoe", "knife", "ladder", "lantern", "lever", "mallet", "needle", "pliers", "pulley", "rake", "rope", "ruler",
        "saw", "scissors", "screwdriver", "shovel", "sickle", "spade", "tongs", "trowel", "wrench",
    ),
    "place": (
        "airport", "bakery", "beach", "bridge", "canyon", "castle", "cave", "cinema", "desert", "factory", "farm",
        "forest", "garden", "glacier", "harbor", "hospital", "hotel", "island", "jungle", "lagoon", "library", "market",
        "meadow", "museum", "palace", "prison", "school", "stadium", "temple", "theater", "valley", "village",
    ),
}  # fmt: skip

#: All of them, in a fixed order.
WORDS: tuple[str, ...] = tuple(word for kind in KINDS.values() for word in kind)

#: Plain sentences without a fact.
NOISE = ("The door is open.", "The lamp is warm.", "The road is long.", "We walk there.", "We come back again.")


@functools.cache
def essay() -> tuple[str, ...]:
    """Sentences of technical English from the held-out half of CPython's help topics, without digits or markup."""
    from trimtab.runtime.text.builtin import builtin_text, split

    found = []
    for paragraph in split(builtin_text())[1].split("\n\n"):
        text = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.?!]) ", text):
            plain = sum(character.isalpha() or character in " ,." for character in sentence)
            if (
                30 <= len(sentence) <= 240
                and plain >= 0.93 * len(sentence)
                and re.match(r"[A-Z][a-z ].*[.?!]$", sentence)
            ):
                found.append(sentence)
    return tuple(sentence for sentence in found if not re.search(r"\d", sentence))
