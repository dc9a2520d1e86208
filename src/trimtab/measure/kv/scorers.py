"""How an answer is scored: the rules of SCBench, 0 to 1 for each turn.

Source: scores of SCBench (MIT), https://github.com/microsoft/MInference/tree/main/scbench, written anew.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trimtab.errors import unknown

if TYPE_CHECKING:
    from trimtab.measure.kv.dialogue import Turn

#: A function counts as repeated from this similarity on.
PASS_AT = 0.8


def substring(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer stands in the prediction as it is spelt.

    >>> substring("the value is 4821.", ["4821"]), substring("4812", ["4821"])
    (1.0, 0.0)
    """
    return float(answers[0] in prediction)


def contained(prediction: str, answers: Sequence[str]) -> float:
    """1 if any answer stands in the prediction, whatever the case.

    >>> contained(" Red, I think", ["red"])
    1.0
    """
    return float(any(answer.upper() in prediction.upper() for answer in answers))


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the prediction, whatever the case, to two places.

    >>> match_all("AB and CD", ["AB", "cd", "EF"])
    0.67
    """
    return round(sum(answer.lower() in prediction.lower() for answer in answers) / len(answers), 2)


def first_integer(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first run of digits is the answer, digit for digit.

    >>> first_integer(" 4821, not 17", ["4821"]), first_integer("17 or 4821", ["4821"])
    (1.0, 0.0)
    """
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found.group() == answers[0])


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first number, decimals included, equals the answer; a whole answer is compared without decimals.

    >>> first_number("It is 12.7", ["12"]), first_number("It is 12.7", ["12.5"])
    (1.0, 0.0)
    """
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    whole = re.fullmatch(r"-?\d+", answers[0]) is not None
    return float(int(float(found.group())) == int(answers[0]) if whole else float(found.group()) == float(answers[0]))


def choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first letter is the right option, or the answer is given in words, or named after "answer is".

    >>> choice("B. the second", ["the second", "B"]), choice("The answer is C", ["the second", "B"])
    (1.0, 0.0)
    """
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    text = " ".join(re.sub("[\n\"'.,?!{}]", " ", text).split(" "))
    text = re.sub(" +", " ", text)
    for start in ("answer is:", "answer:", "answer is", "option is"):
        _, found, after = text.partition(start)
        if found:
            return float(any(after[1:].startswith(answer) for answer in answers) and len(after) > 1)
    named = next((word for word in text.split() if word in "ABCD"), None)
    return float(named in answers)


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of words with any answer, without case, punctuation and articles.

    >>> qa_f1("The red house.", ["a red house", "green"])
    1.0
    """
    return max(_f1(_words(prediction), _words(answer)) for answer in answers)


def qa_f1_zh(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of characters with any answer, without punctuation and spaces."""
    return max(_f1(_characters(prediction), _characters(answer)) for answer in answers)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words with the answer; for summaries.

    >>> round(rouge_l("the cat sat down", ["the cat lay down"]), 2)
    0.75
    """
    said, wanted = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, answers[0]))
    common = _longest_common(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def similarity(prediction: str, answers: Sequence[str], rivals: Sequence[str] = ()) -> float:
    """1 if the code is at least 0.8 similar to the answer (BLEU of words) and to no rival more; pass@1 of RepoQA."""
    code = _code(prediction)
    own = bleu(code, answers[0])
    return float(own >= PASS_AT and all(bleu(code, rival) <= own for rival in rivals))


def bleu(candidate: str, reference: str) -> float:
    """BLEU-4 of words apart by white space; empty precisions are smoothed by the length (method 4 of Chen and Cherry).

    >>> bleu("a b c d e", "a b c d e"), bleu("", "a")
    (1.0, 0.0)
    """
    said, wanted = candidate.split(), reference.split()
    if not said or not set(said) & set(wanted):
        return 0.0
    logs, empty = [], 1
    for order in range(1, 5):
        ours, theirs = (
            Counter(zip(*(words[shift:] for shift in range(order)), strict=False)) for words in (said, wanted)
        )
        total = max(1, sum(ours.values()))
        hits = sum((ours & theirs).values())
        if hits == 0 and len(said) > 1:
            hits = 1 / (2**empty * 5 / math.log(len(said)))
            empty += 1
        elif hits == 0:
            return 0.0
        logs.append(math.log(hits / total))
    brevity = min(0.0, 1 - len(wanted) / len(said))
    return math.exp(brevity + sum(logs) / 4)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted)) if same else 0.0


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _characters(text: str) -> list[str]:
    return [character for character in text.lower() if character.isalnum()]


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for index, match in enumerate(other, 1):
            before, row[index] = row[index], before + 1 if word == match else max(row[index], row[index - 1])
    return row[-1]


def _code(text: str) -> str:
    """The first block between fences, or everything before a closing one."""
    block = re.search(r"^```(?:\w+)?[ \t]*\n(.*?)^```", text.strip(), re.DOTALL | re.MULTILINE)
    return block.group(1) if block else re.split(r"^```", text, maxsplit=1, flags=re.MULTILINE)[0]


SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "substring": substring,
    "contained": contained,
    "match-all": match_all,
    "first-integer": first_integer,
    "first-number": first_number,
    "choice": choice,
    "qa-f1": qa_f1,
    "qa-f1-zh": qa_f1_zh,
    "rouge-l": rouge_l,
    "similarity": similarity,
}


def score(turn: Turn, prediction: str) -> float:
    """Score a prediction by the rule of its turn.

    Raises:
        SpecError: the turn names no rule.
    """
    if turn.scorer not in SCORERS:
        raise unknown("scorer", turn.scorer, SCORERS)
    if turn.scorer == "similarity":
        return similarity(prediction, turn.answers, turn.rivals)
    return SCORERS[turn.scorer](prediction, turn.answers)
