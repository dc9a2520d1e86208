"""The evaluation of caches: scorers against their rules, tasks that are solvable and repeatable, the two modes, statistics."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import CalibrationError, SpecError, UnsupportedModelError
from trimtab.measure.kv import through_cache
from trimtab.measure.kv.code import functions
from trimtab.measure.kv.data import read_dialogues
from trimtab.measure.kv.dialogue import Dialogue, Turn
from trimtab.measure.kv.engines import engine_of
from trimtab.measure.kv.harness import evaluate, open_methods, summarise, through_text
from trimtab.measure.kv.kernels import DecodeAttention, median_seconds
from trimtab.measure.kv.modes import Answer, Run, Track, run
from trimtab.measure.kv.oracle import attention_to_context, overlap
from trimtab.measure.kv.prompts import ChatFormat
from trimtab.measure.kv.request import TIERS, Request, check, parse_methods
from trimtab.measure.kv.scorers import bleu, rouge_l, score
from trimtab.measure.kv.stats import bootstrap, paired
from trimtab.measure.kv.tasks import TASKS, dialogues, find_task
from trimtab.measure.kv.taxonomy import PAPER, life_cycle, table
from trimtab.model.variant import Model, Variant
from trimtab.runtime.native import NativeModel
from trimtab.runtime.step import Step
from trimtab.spec.tree import Edit
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all, technique_names

BUILT = [name for name, task in TASKS.items() if task.build]


class Pieces:
    """Counts as tokenizers do, roughly: words, digits and marks are tokens."""

    chat_template = None
    eog_ids = frozenset({0})
    prefix: tuple[int, ...] = ()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return [len(piece) for piece in re.findall(r" ?[A-Za-z_]+|\d|\s|[^\w\s]", text)]


class Letters:
    """Every ASCII character is a token; 130 ends an answer."""

    eog_ids = frozenset({130})
    prefix: tuple[int, ...] = ()

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(token) if token < 128 else "?" for token in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        from trimtab.runtime.text.chat import render_chat

        return render_chat(self.chat_template or "", messages, add_generation_prompt=add_generation_prompt)


CHAT = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


class Tape:
    """A store that remembers tokens instead of keys."""

    def __init__(self, closed: list[list[int]]) -> None:
        self.closed = closed
        self.peak_bytes = 0
        self.marks = 0

    def open(self, reserve_tokens: int = 0) -> list[int]:
        return []

    def free(self, seq: list[int]) -> None:
        self.closed.append(list(seq))

    def mark(self, seq: list[int]) -> list[int]:
        self.marks += 1
        return list(seq)

    def reset(self, seq: list[int], mark: list[int]) -> None:
        seq[:] = mark

    def release(self, mark: list[int]) -> None:
        self.marks -= 1

    def end_turn(self, seq: list[int]) -> None:
        pass

    def nbytes(self, seq: list[int]) -> Any:
        class Bytes:
            held = len(seq)

        return Bytes


class Alphabet:
    """A model that says the next letter; remembers what went through it."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.passes: list[str] = []
        self.closed: list[list[int]] = []
        self.stores: list[Tape] = []

    def open_store(self) -> Tape:
        self.stores.append(Tape(self.closed))
        return self.stores[-1]

    def keep_tokens(self, ids: np.ndarray, record: Any) -> np.ndarray:
        return np.arange(len(ids))

    def forward(self, tokens: np.ndarray, step: Step, store: Tape, logits_rows: np.ndarray) -> np.ndarray:
        self.passes.append(Letters().decode(tokens))
        assert step.positions[0] == len(step.seqs[0])  # type: ignore[arg-type]
        step.seqs[0].extend(tokens.tolist())  # type: ignore[attr-defined]
        logits = np.zeros((len(logits_rows), 131), np.float32)
        logits[np.arange(len(logits_rows)), (tokens[logits_rows] + 1) % 131] = 10.0
        return logits


def ask(question: str, answer: str, **other: Any) -> Turn:
    return Turn(**{"question": question, "answers": (answer,), "scorer": "substring", "max_new_tokens": 3, **other})


def prompt_of(tokenizer: Any, *turns: Turn, context: str = "context") -> Any:
    return ChatFormat(tokenizer).prompt(Dialogue(id="0", task="t", context=context, turns=turns))


# ------------------------------------------------------------------------------------------------------- scorers


@pytest.mark.parametrize(
    ("scorer", "prediction", "answers", "wanted"),
    [
        ("substring", 'The value is "4821".', ["4821"], 1),
        ("substring", "AB", ["ab"], 0),  # as spelt
        ("contained", "it was RED", ["red", "blue"], 1),
        ("contained", "green", ["red", "blue"], 0),
        ("match-all", "ab, CD", ["AB", "CD", "EF"], 0.67),
        ("match-all", "AB CD EF", ["EF", "AB", "CD"], 1),
        ("first-integer", "is 4821 and 77", ["4821"], 1),
        ("first-integer", "is 77 and 4821", ["4821"], 0),
        ("first-integer", "48215", ["4821"], 0),  # the whole run of digits
        ("first-integer", "none", ["4821"], 0),
        ("first-number", "about 12.7", ["12"], 1),
        ("first-number", "about 12.7", ["12.7"], 1),
        ("first-number", "about 12.7", ["12.5"], 0),
        ("choice", "B", ["the sea", "B"], 1),
        ("choice", "the sea", ["the sea", "B"], 1),
        ("choice", "So the answer is B.", ["the sea", "B"], 1),
        ("choice", "So the answer is C.", ["the sea", "B"], 0),
        ("choice", "", ["the sea", "B"], 0),
        ("qa-f1", "The red, house!", ["a red house"], 1),
        ("qa-f1", "red", ["red house", "blue"], 2 / 3),
        ("qa-f1-zh", "北京。", ["北京"], 1),
        ("rouge-l", "the cat sat down", ["the cat lay down"], 0.75),
        ("rouge-l", "", ["the cat"], 0),
    ],
)
def test_scorers_follow_their_rules(scorer: str, prediction: str, answers: list[str], wanted: float) -> None:
    turn = Turn(question="?", answers=tuple(answers), scorer=scorer, max_new_tokens=9)
    assert score(turn, prediction) == pytest.approx(wanted)


def test_bleu_is_its_definition() -> None:
    reference = "the cat sat on the mat"
    # 5 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples, one word short
    wanted = math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu("the cat sat on mat", reference) == pytest.approx(wanted)
    assert bleu(reference, reference) == pytest.approx(1)
    assert bleu("dogs bark", reference) == 0
    # no pair: 1 / (2^1 * 5 / ln 2) hits of 1, and so on with 2^2 and 2^3
    empty = [math.log(2) / (2**k * 5) for k in (1, 2, 3)]
    assert bleu("the mat", "the dog mat") == pytest.approx(math.exp(1 - 3 / 2) * math.prod(empty) ** 0.25)


def test_code_passes_if_it_is_nearest_to_the_right_function() -> None:
    def turn(answer: str, *rivals: str) -> Turn:
        return ask("?", answer, scorer="similarity", rivals=rivals)

    body = "(a):\n    b = a + 1\n    c = b * 2\n    d = c - a\n    e = d / b\n    return e"
    first, second = f"def f{body}", f"def g{body}"
    assert bleu(second, first) > 0.8  # near enough to pass, but for its rival
    assert score(turn(first), first) == 1
    assert score(turn(first, second), f"Here:\n```python\n{first}\n```\nDone.") == 1
    assert score(turn(first), f"{first}\n```\nand more words that are not code") == 1
    assert score(turn(first, second), second) == 0
    assert score(turn(first), "return b") == 0


def test_an_unknown_scorer_is_named() -> None:
    with pytest.raises(SpecError, match="Did you mean 'substring'"):
        score(ask("?", "a", scorer="substrin"), "a")


def test_rouge_counts_the_longest_common_subsequence() -> None:
    assert rouge_l("a x b y c", ["a b c"]) == pytest.approx(2 * 3 / 8)


# --------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", BUILT)
def test_tasks_repeat_for_a_seed_and_fit_their_length(name: str) -> None:
    tokenizer: Any = Pieces()
    made = [dialogues(name, tokenizer, tokens=640, count=2, seed=seed) for seed in (3, 3, 4)]
    assert made[0] == made[1]
    assert made[0][0].context != made[0][1].context != made[2][1].context
    for dialogue in made[0]:
        assert 300 < len(tokenizer.encode(dialogue.context)) <= 640
        assert len({turn.question for turn in dialogue.turns}) == len(dialogue.turns) == min(5, TASKS[name].turns)
        assert all(turn.max_new_tokens > 0 and turn.answers for turn in dialogue.turns)
    shorter = dialogues(name, tokenizer, tokens=640, turns=1, count=1, seed=3)
    assert len(shorter[0].turns) == 1


@pytest.mark.parametrize("name", [name for name in BUILT if name not in ("manyshot", "mf")])
def test_answers_stand_in_the_context_and_not_in_the_questions(name: str) -> None:
    for dialogue in dialogues(name, Pieces(), tokens=640, count=3, seed=1):  # type: ignore[arg-type]
        for turn in dialogue.turns:
            assert all(answer in dialogue.context for answer in turn.answers)
            assert not any(answer in turn.question + turn.prefix for answer in turn.answers)
            assert score(turn, turn.gold) == 1


def test_each_key_has_one_value() -> None:
    (dialogue,) = dialogues("kv", Pieces(), tokens=640, count=1, seed=0)  # type: ignore[arg-type]
    pairs = re.findall(r'"(\w+)": "(\d{4})",', dialogue.context)
    assert len(pairs) == len(dict(pairs)) == len({value for _, value in pairs}) == 8
    for turn in dialogue.turns:
        key = re.match(r'Key: "(\w+)"', turn.question)
        assert key and turn.answers == (dict(pairs)[key.group(1)],)


def test_both_ends_of_a_string_name_one_while_one_end_does_not() -> None:
    (dialogue,) = dialogues("prefix_suffix", Pieces(), tokens=640, count=1, seed=0)  # type: ignore[arg-type]
    strings = re.findall(r"String: ([a-z]+)-(\d+)-([a-z]+)\.", dialogue.context)
    assert len({(head, tail) for head, _, tail in strings}) == len(strings)
    assert len({head for head, *_ in strings}) < len(strings) > len({tail for *_, tail in strings})
    for turn in dialogue.turns:
        head, tail = re.findall(r"'([a-z]+)'", turn.question)
        assert turn.answers == tuple(f"{a}-{b}-{c}" for a, b, c in strings if (a, c) == (head, tail))


def test_variables_lead_to_their_value_in_order() -> None:
    (dialogue,) = dialogues("multihop", Pieces(), tokens=800, count=1, seed=2)  # type: ignore[arg-type]
    held: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (\w+(?: \w+)?)\.", dialogue.context):
        held[name] = held[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    for turn in dialogue.turns:
        value = re.search(r"\d{5}", turn.question)
        assert value and set(turn.answers) == {name for name, own in held.items() if own == value.group()}
        assert len(turn.answers) == 3


def test_numbers_are_found_by_sorting() -> None:
    (dialogue,) = dialogues("mf", Pieces(), tokens=300, turns=7, count=1, seed=2)  # type: ignore[arg-type]
    found = sorted(int(number) for number in re.findall(r"\d{3}", dialogue.context))
    wanted = (found[-1], found[0], found[-2], found[1], found[len(found) // 2], found[-3], found[2])
    assert tuple(int(turn.answers[0]) for turn in dialogue.turns) == wanted and len(found) % 2


def test_common_words_are_common() -> None:
    (dialogue,) = dialogues("common_words", Pieces(), tokens=900, count=1, seed=0)  # type: ignore[arg-type]
    words = re.findall(r"\d+\. (\w+)", dialogue.context)
    often = sorted(set(words), key=words.count, reverse=True)
    assert set(often[:3]) == set(dialogue.turns[0].answers) and words.count(often[2]) >= 4 * words.count(often[3])


def test_functions_are_found_by_description_alone() -> None:
    assert len(functions()) > 40
    for name, described, source in functions():
        assert described not in source and source.startswith(f"def {name}(")


@pytest.mark.parametrize(
    ("name", "tokens", "turns", "message"),
    [
        ("kv", 128, 9, r"128 tokens holds facts for 4 questions; turns=9.*Try --turns 4"),
        ("needles", 128, 3, "2 questions; turns=3"),
        ("mf", 512, 8, "7 questions; turns=8"),
        ("niah_single", 512, 2, "Allowed: 1. Try --turns 1"),
        ("kv", 512, 11, r"Allowed: 1\.\.10"),
        ("kv", 32, 1, "too short"),
        ("en_qa", 512, 1, "--data FILE"),
        ("kw", 512, 1, "Did you mean 'kv'"),
    ],
)
def test_tasks_refuse_in_a_sentence(name: str, tokens: int, turns: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dialogues(name, Pieces(), tokens=tokens, turns=turns, count=1, seed=0)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- modes


def test_histories_differ_in_the_transcript(tiny_model: Any) -> None:
    turns = (ask("Qa", "bcd"), ask("Qx", "zzz"), ask("Qk", "lmn"))
    kept = {}
    for history in ("golden", "own"):
        model: Any = Alphabet(tiny_model.spec)
        found = run(model, prompt_of(Letters(CHAT), *turns), Letters(), history=history)  # type: ignore[arg-type]
        kept[history] = [answer.history for answer in found.answers]
        (tape,) = model.closed
        middle = "zzz" if history == "golden" else "?@A"  # after <a> the alphabet goes on with ?
        assert Letters().decode(tape).count("<u>") == 3
        assert f"<u>context\n\nQa</><a>{kept[history][0]}</><u>Qx</><a>{middle}</><u>Qk</><a>" in Letters().decode(tape)
        assert [answer.prediction for answer in found.answers] == ["?@A", "?@A", "?@A"]
        assert model.stores[0].marks == 0  # every mark is given up
    assert kept == {"golden": ["bcd", "zzz", "lmn"], "own": ["?@A"] * 3}


def test_an_answer_is_graded_from_the_same_state_twice(tiny_model: Any) -> None:
    model: Any = Alphabet(tiny_model.spec)
    right, wrong = ask("Q", "bcd", prefix="a", glued=True), ask("Q", "bxd", prefix="a", glued=True)
    found = run(model, prompt_of(Letters(), right, wrong), Letters())  # type: ignore[arg-type]
    sure = math.log(math.exp(10) + 130) - 10  # nll of the letter expected
    assert [answer.prediction for answer in found.answers] == ["bcd", "bcd"]
    assert [answer.score for answer in found.answers] == [1, 0]
    # b is expected after a; x is not after b; d is not after x
    assert [answer.nll_nats for answer in found.answers] == pytest.approx([3 * sure, sure + 2 * (sure + 10)])


def test_an_answer_ends_with_its_line_its_end_token_or_its_length(tiny_model: Any) -> None:
    model: Any = Alphabet(tiny_model.spec)
    # chr(9) is followed by a newline; 129 by the end token
    turns = (ask("Q", "z", prefix="\t", max_new_tokens=5), ask("Q", "z", prefix="\x80", max_new_tokens=5))
    found = run(model, prompt_of(Letters(), *turns), Letters())  # type: ignore[arg-type]
    assert [answer.prediction for answer in found.answers] == ["", "?"]
    lines = ask("Q", "z", prefix="\t", lines=True, max_new_tokens=5)
    assert run(model, prompt_of(Letters(), lines), Letters()).answers[0].prediction == "\n\x0b\x0c\r\x0e"  # type: ignore[arg-type]


def test_requests_prefill_the_context_once_and_see_no_other_question(tiny_model: Any) -> None:
    model: Any = Alphabet(tiny_model.spec)
    prompt = prompt_of(Letters(CHAT), ask("Qa", "bcd"), ask("Qx", "zzz"), ask("Qk", "lmn"))
    found = run(model, prompt, Letters(), mode="multi-request")  # type: ignore[arg-type]
    assert sum("context" in piece for piece in model.passes) == 1
    assert model.passes[0] == Letters().decode(prompt.context) == "<u>context"
    assert found.prefill_tokens == len(prompt.context)
    assert found.query_tokens == sum(len(asked.alone) for asked in prompt.turns)
    assert found.recompute_tokens == 3 * len(prompt.context) + found.query_tokens
    assert model.closed == [list(prompt.context)]  # nothing of a question is left
    assert found.held_bytes == found.final_bytes == len(prompt.context)


def test_turns_prefill_the_first_question_with_the_context(tiny_model: Any) -> None:
    model: Any = Alphabet(tiny_model.spec)
    prompt = prompt_of(Letters(CHAT), ask("Qa", "bcd"), ask("Qx", "zzz"))
    found = run(model, prompt, Letters())  # type: ignore[arg-type]
    first, second = (len(asked.question) for asked in prompt.turns)
    assert model.passes[0] == "<u>context\n\nQa</><a>"
    assert found.prefill_tokens == len(prompt.context) + first and found.query_tokens == second
    assert found.recompute_tokens == 2 * (len(prompt.context) + first) + 3 + second


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize(
    "method",
    [
        "full", "streaming-llm:sink=2,recent=20", "kivi:bits=2,group=16,residual=16", "snapkv:cap=30,window=8,kernel=3",
        "snapkv:cap=40,window=8,kernel=3+kivi:bits=4,group=16,residual=16", "h2o:cap=30", "think:ratio=0.5,recent=8",
        "quest:budget=32,page=16,skip=0",
    ],
)  # fmt: skip
def test_a_question_asked_again_gets_bit_equal_logits(
    tiny_model: Any, tiny_materials: Any, method: str, engine: Any
) -> None:
    model = Model(tiny_model.variant, lambda: Letters())  # type: ignore[arg-type]
    runners, _ = open_methods(model, [method], tiny_materials, engine)
    track = Track(runners[method], 300)
    track.prefill(range(3, 90))
    start, seen = track.mark(), []
    for question in ([5, 6, 7], [9, 8] * 30, [5, 6, 7]):
        rows = [track.extend(question), *(track.decode(token) for token in (11, 12, 13))]
        seen.append(np.stack(rows))
        track.reset(start)
    assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])
    assert track.session.lengths == [87]
    track.session.close()


def test_nll_is_that_of_the_whole_conversation(tiny_model: Any) -> None:
    """Two turns through the cache against one pass over the transcript without a cache."""
    prompt = prompt_of(Letters(CHAT), ask("first", "abc"), ask("second", "de"))
    found = run(tiny_model.runner(), prompt, Letters())  # type: ignore[arg-type]
    whole = [*prompt.context]
    for asked, answer in zip(prompt.turns, found.answers, strict=True):
        whole += asked.question
        start = len(whole)
        whole += asked.gold
        logs = tiny_model.logits(whole)[0].double().log_softmax(-1)
        wanted = -sum(float(logs[at - 1, whole[at]]) for at in range(start, len(whole)))
        assert answer.nll_nats == pytest.approx(wanted, abs=1e-3)  # float32 kernels over another split of the tokens
        greedy = tiny_model.generate(whole[:start], max_new_tokens=3, ignore_eos=True, temperature=0.0).ids
        assert answer.prediction == Letters().decode(greedy).partition("\n")[0].partition(chr(130))[0]


def test_a_ring_forgets_what_the_full_cache_knows(tiny_model: Any, tiny_materials: Any) -> None:
    methods = ("full", "streaming-llm:sink=2,recent=20")
    runners, stages = open_methods(tiny_model, methods, tiny_materials)
    prompt = prompt_of(Letters(), ask("first", "abc"), context="c" * 150)
    found = {method: run(runners[method], prompt, Letters(), mode="multi-request") for method in methods}  # type: ignore[arg-type]
    assert found[methods[1]].held_bytes == tiny_model.spec.kv_nbytes(22) < found["full"].held_bytes
    assert found["full"].held_bytes == tiny_model.spec.kv_nbytes(150) <= found["full"].peak_bytes
    assert found[methods[1]].answers[0].nll_nats != found["full"].answers[0].nll_nats
    assert stages == {"full": "", methods[1]: "compression"}


def test_modes_and_histories_are_checked(tiny_model: Any) -> None:
    prompt, model = prompt_of(Letters(), ask("Q", "a")), Alphabet(tiny_model.spec)
    for other, wanted in (({"mode": "multiturn"}, "multi-turn"), ({"history": "gold"}, "golden")):
        with pytest.raises(SpecError, match=f"Did you mean '{wanted}'"):
            run(model, prompt, Letters(), **other)  # type: ignore[arg-type]
    long = prompt_of(Letters(), ask("Q", "a"), context="c" * 510)
    with pytest.raises(SpecError, match="exceed the context"):
        run(model, long, Letters())  # type: ignore[arg-type]


def test_a_template_that_drops_messages_is_refused() -> None:
    with pytest.raises(SpecError, match="Multi-turn evaluation needs that"):
        ChatFormat(Letters("{{ messages[0]['content'] }}"))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- through the cache


def test_perplexity_through_the_full_cache_is_that_without_one(tiny_model: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 131, 90).tolist()
    logs = tiny_model.logits(ids)[0].double().log_softmax(-1)
    wanted = [-float(logs[at - 1, ids[at]]) for at in range(45, 90)]
    for chunk in (1, 16, 64):
        assert through_cache.nll_through_cache(tiny_model.runner(), ids, chunk=chunk) == pytest.approx(wanted, abs=1e-4)
    assert through_cache.perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    wanted = [-float(logs[at - 1, ids[at]]) for at in range(70, 90)]
    assert through_cache.nll_through_cache(tiny_model.runner(), ids, prompt=70) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(SpecError, match="prompt=90 of 90 tokens"):
        through_cache.nll_through_cache(tiny_model.runner(), ids, prompt=90)


def test_decoding_is_compared_token_by_token(tiny_model: Any, tiny_materials: Any) -> None:
    ring = "streaming-llm:sink=1,recent=8"
    runners, _ = open_methods(tiny_model, ["full", ring], tiny_materials)
    ids = np.random.default_rng(1).integers(0, 131, 60).tolist()
    full, forgot = (through_cache.decode_logits(runners[method], ids, steps=20) for method in ("full", ring))
    assert np.allclose(full, tiny_model.logits(ids)[0, 40:].numpy(), atol=1e-4)
    same, other = through_cache.compare([full], [full]), through_cache.compare([full], [forgot])
    assert set(same.kl_nats[0]) == {0.0} and set(same.agree[0]) == {1.0}
    p, q = (torch.from_numpy(rows).double().log_softmax(-1) for rows in (full, forgot))
    assert other.kl_nats[0] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-9)
    assert list(other.agree[0]) == (p.argmax(-1) == q.argmax(-1)).double().tolist() and min(other.kl_nats[0]) > 0
    for short in ([1, 2, 3], ids[:20]):
        with pytest.raises(CalibrationError):
            through_cache.decode_logits(runners["full"], short, steps=20)


# ---------------------------------------------------------------------------------------------------- statistics


def test_intervals_draw_whole_dialogues() -> None:
    # Two dialogues of many equal turns are two samples, not two hundred.
    found = bootstrap([[0.0] * 100, [1.0] * 100])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert bootstrap([[0.0], [1.0]] * 100).high < 0.6
    assert bootstrap([[1.0, 0.0]]) == bootstrap([[0.0, 1.0]]) and bootstrap([[1.0, 0.0]]).low == 0.5
    assert bootstrap([[0.0], [1.0, 1.0, 1.0]]).mean == 0.75  # every turn counts the same


def test_intervals_repeat_for_a_seed() -> None:
    values = np.random.default_rng(0).normal(size=(9, 4)).tolist()
    assert bootstrap(values, 1) == bootstrap(values, 1) != bootstrap(values, 2)
    with pytest.raises(SpecError, match="nothing to average"):
        bootstrap([[]])


def test_pairing_finds_a_difference_that_spread_hides() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(12, 3)) * 10
    ours, theirs = hard + 0.5 + rng.normal(size=hard.shape) * 0.1, hard
    found = paired(ours.tolist(), theirs.tolist())
    assert found.excludes(0) and found.low < 0.5 < found.high + 0.1 and found.high - found.low < 0.3
    assert bootstrap(ours.tolist()).high - bootstrap(ours.tolist()).low > 2
    with pytest.raises(SpecError, match="same dialogues"):
        paired([[1.0]], [[1.0, 2.0]])


# ------------------------------------------------------------------------------------------------------- harness


def test_methods_are_parsed_with_the_full_cache_first() -> None:
    assert parse_methods("streaming-llm:sink=2,recent=8; full") == ("full", "streaming-llm:sink=2,recent=8")
    with pytest.raises(SpecError, match="Did you mean 'streaming-llm'"):
        parse_methods("full;streaming-lm")
    assert Request(methods=("streaming-llm",)).methods == ("full", "streaming-llm")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: Request(lengths=(512,)), "len=512 and the questions do not fit the context of tiny-llama, 512"),
        (
            lambda: Request(lengths=(64,), methods=("gemfilter:layer=1,topk=8",), modes=("multi-request",)),
            "gemfilter chooses prompt tokens by the question.*Try --mode multi-turn",
        ),
        (lambda: Request(sessions=0), "sessions=0"),
        (lambda: Request(turns=11), "turns=11"),
        (lambda: Request(window=64, steps=64), "64 steps"),
        (lambda: Request(modes=("turns",)), "Known: multi-request, multi-turn"),  # type: ignore[arg-type]
        (lambda: Request(history="mine"), "Known: golden, own"),  # type: ignore[arg-type]
        (lambda: Request(tasks=("kvs",)), "Did you mean 'kv'"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(
    tiny_model: Any, request_: Callable[[], Request], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        check(request_(), tiny_model.spec)


def test_gemfilter_may_see_the_question_of_a_turn(tiny_model: Any) -> None:
    check(Request(lengths=(64,), methods=("gemfilter:layer=1,topk=8",), modes=("multi-turn",)), tiny_model.spec)


def test_a_row_holds_both_sides_of_a_pair() -> None:
    def runs(*scores: float, nll: float = 1.0, held: int = 8) -> list[Run]:
        return [
            Run(
                answers=[Answer(score=value, nll_nats=nll + turn, prediction="") for turn, value in enumerate(scores)],
                held_bytes=held, peak_bytes=held + index, prefill_tokens=5, prefill_s=1.0 + index, decode_s=0.1,
            )
            for index in range(2)
        ]  # fmt: skip

    row = summarise(runs(1, 0, nll=3.0, held=4), runs(1, 1))
    assert row.status == "ok" and (row.sessions, row.turns) == (2, 2)
    assert row.accuracy and row.accuracy.mean == 0.5 and row.full_accuracy == 1
    assert row.accuracy_by_turn == (1, 0) and row.nll_by_turn == (3, 4)
    assert row.nll_difference and row.nll_difference.mean == 2 and row.full_nll_nats == 1.5
    assert row.accuracy_difference and row.accuracy_difference.mean == -0.5
    assert (row.held_bytes, row.full_held_bytes, row.peak_bytes, row.prefill_tokens) == (4, 8, 5, 10)
    assert row.prefill_s == 1.5
    beyond = summarise(runs(0, 0), runs(0, 0.7))
    assert beyond.status == "beyond-model" and "cannot do this task" in beyond.note


def test_a_request_becomes_rows(tiny_model: Any, tiny_materials: Any, tmp_path: Path) -> None:
    record = {
        "id": 7,
        "context": "c" * 99,
        "multi_turns": [{"input": "Q1", "answer": "ab"}, {"input": "Q2", "answer": "c"}],
    }
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps(record) + "\n\n" + json.dumps(record | {"id": 8}) + "\n")
    ring = "streaming-llm:sink=2,recent=20"
    request = Request(
        methods=(ring,), tasks=("en_qa",), modes=("multi-turn", "multi-request"), lengths=(64,), data=data, windows=2,
        window=80, steps=16,
    )  # fmt: skip
    runners, stages = open_methods(tiny_model, request.methods, tiny_materials)
    found = evaluate(runners, Letters(), request, text="abcdefgh" * 40, stages=stages)  # type: ignore[arg-type]
    cells = [(row.method, row.task, row.mode, row.status) for row in found.rows]
    assert cells == [(method, "mine", mode, "beyond-model") for mode in request.modes for method in ("full", ring)]
    full, method = found.rows[:2]
    assert full.nll_difference and full.nll_difference.mean == 0 and full.stage == "" and method.stage == "compression"
    assert method.nll_difference and method.nll_difference.mean != 0
    assert method.held_bytes == tiny_model.spec.kv_nbytes(22) and method.full_held_bytes == full.held_bytes
    assert full.full_accuracy == full.accuracy.mean if full.accuracy else False
    assert [row.prefill_tokens for row in found.rows[2:]] == [2 * 99] * 2
    base, other = found.text
    assert base.ppl == base.full_ppl == other.full_ppl != other.ppl and base.kl_nats.mean == 0 < other.kl_nats.mean
    assert (other.tokens, other.steps) == (80, 32)
    json.dumps(found.to_dict())


def test_tasks_without_text_say_what_they_need(tiny_model: Any) -> None:
    found = evaluate({"full": tiny_model.runner()}, Letters(), Request(tasks=("zh_qa",), lengths=(64,)))  # type: ignore[arg-type]
    (row,) = found.rows
    assert row.status == "needs-data" and "--data" in row.note and row.accuracy is None and not found.text


def test_a_dialogue_beyond_the_context_is_refused_before_any_runs(tiny_model: Any) -> None:
    model = Alphabet(tiny_model.spec)
    with pytest.raises(SpecError, match=r"kv: a context of \d+ tokens and 5 questions.*fewer --turns"):
        evaluate({"full": model}, Letters(), Request(tasks=("kv",), lengths=(500,)))  # type: ignore[arg-type]
    assert not model.passes


def test_tiers_ask_for_tasks_that_exist() -> None:
    for request in TIERS.values():
        assert all(find_task(name).build for name in request.tasks)
        for name in request.tasks:
            for tokens in request.lengths:
                dialogues(name, Pieces(), tokens=tokens, turns=request.turns, count=1, seed=0)  # type: ignore[arg-type]


def test_text_is_scored_for_every_method(tiny_model: Any, tiny_materials: Any) -> None:
    runners, _ = open_methods(tiny_model, ["full"], tiny_materials)
    (row,) = through_text(runners, Letters(), Request(window=40, steps=8, windows=3), "abcdefghij" * 30)  # type: ignore[arg-type]
    assert row.tokens == 3 * 20 and row.steps == 3 * 8 and row.top1_agreement.mean == 1


# --------------------------------------------------------------------------------------------- engines, kernels, oracle


def test_engines_answer_alike_and_say_why_not(tiny_model: Any) -> None:
    prompt = prompt_of(Letters(), ask("first", "abc"), ask("second", "de"), context="c" * 90)
    native, why = engine_of(Model(tiny_model.variant, lambda: Letters()), "native", threads=1)  # type: ignore[arg-type]
    assert not why and isinstance(native, NativeModel)
    ours, theirs = (run(each.runner(), prompt, Letters()) for each in (native, tiny_model))  # type: ignore[arg-type]
    for one, other in zip(ours.answers, theirs.answers, strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, abs=1e-3)  # float32 sums in another order
    model = Model(tiny_model.variant, lambda: Letters())  # type: ignore[arg-type]
    assert engine_of(model, "torch") == (model, "")
    alibi = tiny_model.spec.edit([Edit("layers.*.self_attn", "alibi", True)], by="test")
    other = Model(Variant(alibi, tiny_model.weights), lambda: Letters())  # type: ignore[arg-type]
    found, why = engine_of(other)
    assert found is other and "ALiBi" in why
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        engine_of(other, "native")
    with pytest.raises(SpecError, match="Did you mean 'native'"):
        engine_of(other, "nativ")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "method", ["", "kivi:bits=4,group=16,residual=32", "think:ratio=0.5,recent=8", "streaming-llm:sink=4,recent=60"]
)
def test_decode_attention_alone_is_its_reference(tiny_model: Any, method: str) -> None:
    spec = compose(tiny_model.spec, parse_all([method] if method else []))
    arm = DecodeAttention(spec, 200)
    wanted = arm.reference()
    for _ in range(2):  # a run leaves the cache as it found it
        found, seconds = arm.run()
        assert seconds >= 0
        # the kernel of few-bit keys rounds queries and weights
        apart = 1e-3 if "kivi" in method else 2e-5
        np.testing.assert_allclose(found, wanted, rtol=0, atol=apart * float(np.abs(wanted).max()))
    if method:
        plain = DecodeAttention(tiny_model.spec, 200)
        assert np.abs(plain.run()[0] - wanted).max() > 1e-3 * float(np.abs(wanted).max())
        assert set(median_seconds({"ours": arm, "plain": plain}, rounds=1, warm=0)) == {"ours", "plain"}
        plain.close()
    arm.close()
    assert arm.store.pages_bytes == 0


def test_attention_to_a_context_is_that_of_the_model(tiny_model: Any) -> None:
    context, question = list(range(3, 40)), [50, 51, 52]
    found = attention_to_context(tiny_model, context, question)
    layers, attn = tiny_model.spec.num_hidden_layers, tiny_model.spec.layers[0].self_attn
    assert found.shape == (layers, attn.num_key_value_heads, len(context))
    seen: dict[str, Any] = {}
    step = Step.of([40], [0])
    step.taps = {"self_attn.qk": lambda path, value: seen.__setitem__(path, value)}
    tiny_model.decoder(torch.tensor([*context, *question]), step, None, np.zeros(0, np.int64))
    for layer, (q, k) in enumerate(seen.values()):
        for head in range(attn.num_key_value_heads):
            wanted = np.zeros(40)
            for query in range(attn.num_attention_heads // attn.num_key_value_heads):
                at = head * (attn.num_attention_heads // attn.num_key_value_heads) + query
                for place in (37, 38, 39):
                    scores = (k[: place + 1, head].double() @ q[place, at].double() * attn.scale).numpy()
                    weights = np.exp(scores - scores.max())
                    wanted[: place + 1] += weights / weights.sum()
            np.testing.assert_allclose(found[layer, head], wanted[:37], atol=1e-5)
    # the last token alone, and with the one before it
    whole = attention_to_context(tiny_model, [*context, 50, 51], [52])
    np.testing.assert_allclose(attention_to_context(tiny_model, context, question, last=1), whole[..., :37], atol=1e-5)
    np.testing.assert_array_equal(attention_to_context(tiny_model, context, question, last=3), found)


def test_the_same_question_wants_the_same_tokens(tiny_model: Any) -> None:
    same = [prompt_of(Letters(), ask("first", "a"), ask("first", "a"), context="the context " * 8)] * 2
    assert overlap(tiny_model, same[:1], 10, last=1).share == 1
    found = overlap(tiny_model, same, 10)
    assert (found.share, found.pairs, found.kept) == (1, 2, 10) and found.chance == pytest.approx(10 / 96)
    other = [prompt_of(Letters(), ask("first", "a"), ask("zzzzzzzz", "b"), context="the context " * 8)]
    different = overlap(tiny_model, other, 10)
    assert found.chance < different.share < 1 and 0 < different.mass < 1
    assert len(different.by_layer) == tiny_model.spec.num_hidden_layers
    with pytest.raises(SpecError, match="two turns or more"):
        overlap(tiny_model, [prompt_of(Letters(), ask("first", "a"))], 2)
    with pytest.raises(SpecError, match="kept=500 of a context of 9"):
        overlap(tiny_model, other, 500)


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "turn", "scorer", "answers", "says"),
    [
        ("scbench_kv", {"input": "Key", "answer": "uuid"}, "substring", ("uuid",), "Key"),
        ("scbench_vt", {"input": "Find", "answer": ["AB", "CD"]}, "match-all", ("AB", "CD"), "Find"),
        ("scbench_mf", {"input": "The Largest Number is", "answer": 42}, "first-number", ("42",), "What is the largest number?"),
        ("scbench_choice_eng", {"input": "Who?", "answer": "Bo", "options": ["Al", "Bo", "Cy", "Di"]}, "choice", ("Bo", "B"), "B. Bo"),
        ("scbench_qa_chn", {"input": "谁", "answer": ["北京"]}, "qa-f1-zh", ("北京",), "问题：谁"),
        ("scbench_summary", {"input": "Sum up", "answer": "short"}, "rouge-l", ("short",), "Sum up"),
        ("scbench_summary_with_needles", {"input": "Key?", "answer": ["12"], "task": "scbench_passkey"}, "first-integer", ("12",), "Key?"),
        ("scbench_repoqa_and_kv", {"input": "K", "answer": "v", "task": "scbench_kv"}, "substring", ("v",), "K"),
        ("own", {"input": "Q", "answer": "a"}, "contained", ("a",), "Q"),
    ],
)  # fmt: skip
def test_files_of_the_benchmark_load(
    tmp_path: Path, name: str, turn: dict[str, Any], scorer: str, answers: tuple[str, ...], says: str
) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps({"id": "x", "context": "all {of} it", "multi_turns": [turn, turn]}), "utf-8")
    (dialogue,) = read_dialogues(path)
    assert "all {of} it" in dialogue.context and len(dialogue.turns) == 2 and dialogue.id == "x"
    asked = dialogue.turns[0]
    assert (asked.scorer, asked.answers) == (scorer, answers) and says in asked.question
    assert score(asked, asked.gold) == 1
    assert len(read_dialogues(path, turns=1)[0].turns) == 1


@pytest.mark.parametrize(
    "line", ["{", '{"context": "c"}', '{"context": "c", "multi_turns": []}', '{"context": "c", "multi_turns": [{"input": "q"}]}', ""]
)  # fmt: skip
def test_broken_files_are_refused_with_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(line)
    with pytest.raises(SpecError, match="line 1" if line else "holds no dialogue"):
        read_dialogues(path)
    with pytest.raises(SpecError, match="cannot be read"):
        read_dialogues(tmp_path / "absent.jsonl")


# ------------------------------------------------------------------------------------------------------ taxonomy


@pytest.mark.parametrize("name", sorted(set(PAPER) & set(technique_names())))
def test_the_life_cycle_found_by_pricing_is_the_papers(name: str) -> None:
    assert life_cycle(name).classes == PAPER[name]


def test_the_table_is_made_from_the_registry() -> None:
    rows = table()
    assert rows[0].spec == "full" and all(row.stage for row in rows[1:])
    named = {row.spec.partition(":")[0] for row in rows}
    assert {"streaming-llm", "gemfilter"} | (set(PAPER) & set(technique_names())) <= named
    assert named.isdisjoint({"rtn", "cats"})
    stages = [row.stage for row in rows]
    assert stages == sorted(stages, key=("", "generation", "compression", "retrieval", "loading").index)
    assert [row.spec for row in table(["streaming-llm", "full"])] == ["streaming-llm", "full"]


def test_the_life_cycle_follows_what_is_held_and_read() -> None:
    assert life_cycle("full").classes == ("", "O(n)", "O(n^2)", "O(nm)")
    ring = life_cycle("streaming-llm:sink=64,recent=960")
    assert ring.kv_ratio == pytest.approx(1024 / 65536) and ring.kind == "dropping"
    assert life_cycle("rtn:bits=4").stage == ""
    assert life_cycle("gemfilter:layer=13,topk=1024").classes == ("generation", "O(k)", "O(n^2)", "O(km)")


# -------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--len", "9000"), "len=9000 and the questions do not fit"),
        (("--methods", "gemfilter", "--mode", "multi-request"), "Try --mode multi-turn"),
        (("--tasks", "kv,needls"), "Did you mean 'needles'"),
        (("--tier", "smok"), "Did you mean 'smoke'"),
        (("--engine", "nativ"), "Did you mean 'native'"),
    ],
)
def test_the_command_refuses_in_one_sentence(options: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "trimtab.cli.main", "eval", "kv", "smollm2-135m", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
