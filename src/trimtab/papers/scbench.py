"""Checks of SCBench (arXiv 2412.10319): tasks the model can do, what survives a second question, reuse, history, the table, bad input.

Every cell holds 24 prompts or more. Methods run natively where they can be lowered and in PyTorch else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.papers.claims import Bench, Line, Needs, Outcome

#: Task, most tokens of a context, questions about it, dialogues with turns, dialogues with separate requests, seed.
TASK, TOKENS, TURNS, DIALOGUES, REQUESTED, SEED = "kv", 1000, 5, 24, 8, 0
#: 256 tokens of about 1000, with the window and pooling of the authors' own experiments.
SNAPKV = "snapkv:cap=256,window=32,kernel=7,pool=max"
KIVI, QUEST = "kivi:bits=4", "quest:budget=128,page=8"
A_SHAPE, TRI_SHAPE = "a-shape:sink=16,local=240", "tri-shape:sink=16,local=240,last=64"
#: Methods whose states must come back bit by bit: codes, dropped tokens, both, thin keys, pieces, choices after every pass, a ring.
RESET = (
    "full", KIVI, "snapkv:cap=128", f"snapkv:cap=128+{KIVI}", "think:ratio=0.4", QUEST, "h2o:cap=128", "tova:cap=128",
    "streaming-llm:sink=4,recent=124",
)  # fmt: skip
MODES = ("multi-turn", "multi-request")


def _prompts(bench: Bench, task: str = TASK, tokens: int = TOKENS, count: int = DIALOGUES, turns: int = TURNS) -> list:
    from trimtab.measure.kv.prompts import ChatFormat
    from trimtab.measure.kv.tasks import dialogues

    def compute() -> list:
        tokenizer = bench.model.tokenizer
        built = dialogues(task, tokenizer, tokens=tokens, turns=turns, count=count, seed=SEED)
        return [ChatFormat(tokenizer).prompt(dialogue) for dialogue in built]

    return bench.once(f"scbench.prompts.{task}.{tokens}.{count}.{turns}", compute)


class Cells:
    """Answers of one method: of every turn of the dialogues [dialogues, turns], and of requests [dialogues, turns]."""

    def __init__(self, runs: dict[str, list]) -> None:
        self.runs = runs
        self.right, self.nll = (
            {
                mode: np.array([[getattr(answer, name) for answer in one.answers] for one in found])
                for mode, found in runs.items()
            }
            for name in ("score", "nll_nats")
        )

    def cells(self) -> dict[str, float]:
        """Share right of each turn, and of all requests."""
        by_turn = self.right["multi-turn"].mean(axis=0)
        return {f"turn {turn + 1}": float(x) for turn, x in enumerate(by_turn)} | {
            "requests": float(self.right["multi-request"].mean())
        }

    def __str__(self) -> str:
        turns = " ".join(f"{x:.0%}" for x in self.right["multi-turn"].mean(axis=0))
        nll = " ".join(f"{x:.2f}" for x in self.nll["multi-turn"].mean(axis=0))
        requests = f"{self.right['multi-request'].mean():.0%} ({self.nll['multi-request'].mean():.2f} nats)"
        return f"turns {turns} ({nll} nats), requests {requests}"


def _cells(bench: Bench, method: str) -> Cells:
    """All dialogues of both modes under one method."""
    from trimtab.measure.kv.engines import engine_of
    from trimtab.measure.kv.modes import run
    from trimtab.techniques.apply import applied

    def compute() -> Cells:
        prompts = _prompts(bench)
        with applied(bench.model, *([] if method == "full" else [method])) as model:
            runner = engine_of(model)[0].runner()
            return Cells(
                {
                    "multi-turn": [run(runner, prompt, model.tokenizer, mode="multi-turn") for prompt in prompts],
                    "multi-request": [
                        run(runner, prompt, model.tokenizer, mode="multi-request") for prompt in prompts[:REQUESTED]
                    ],
                }
            )

    return bench.once(f"scbench.cells.{method}", compute)


# --------------------------------------------------------------------------------------------------------------- tasks


def full_cache_answers(bench: Bench) -> Outcome:
    """The same seed twice, another seed, and the full cache on pairs of a word and four digits in 1000 tokens."""
    from trimtab.measure.kv.tasks import TASKS, dialogues

    tokenizer = bench.model.tokenizer
    names = [name for name, task in TASKS.items() if task.build]
    made = [[dialogues(name, tokenizer, tokens=512, count=2, seed=seed) for name in names] for seed in (1, 1, 2)]
    repeat = made[0] == made[1] and all(a != b for a, b in zip(made[0], made[2], strict=True))
    pairs = {prompt.dialogue.context.count('": "') for prompt in _prompts(bench)}
    by_turn = _cells(bench, "full").right["multi-turn"].mean(axis=0)
    nll = _cells(bench, "full").nll["multi-turn"].mean(axis=0)
    return Outcome(
        measured=f"{len(names)} generators {'repeat' if repeat else 'do not repeat'}; {sorted(pairs)} pairs, {DIALOGUES} dialogues, "
        f"right by turn {' '.join(f'{x:.0%}' for x in by_turn)} ({' '.join(f'{x:.2f}' for x in nll)} nats), all {by_turn.mean():.0%}",
        met=repeat and pairs <= set(range(8, 17)) and bool((by_turn >= 0.9).all()),
    )


def says_what_it_cannot_do(bench: Bench) -> Outcome:
    """Variables over two hops, with the full cache: the row must say that accuracy means nothing there."""
    from trimtab.measure.kv.engines import engine_of
    from trimtab.measure.kv.harness import evaluate
    from trimtab.measure.kv.request import Request

    request = Request(tasks=("multihop",), lengths=(512,), sessions=8, turns=3, windows=0)
    found = evaluate({"full": engine_of(bench.model)[0].runner()}, bench.model.tokenizer, request)
    (row,) = found.rows
    return Outcome(
        measured=f"multihop: {row.full_accuracy:.0%} right of {row.sessions * row.turns}, status {row.status}: {row.note}",
        met=row.full_accuracy is not None and row.full_accuracy < 0.4 and row.status == "beyond-model",
    )


def trained_on_recall(bench: Bench) -> Outcome:
    """What the built-in model cannot do, on a small model that was trained to recall."""
    raise Needs("a model trained on recall")


# ---------------------------------------------------------------------------------------------------------- the finding


def eviction_fails_the_second_turn(bench: Bench) -> Outcome:
    """256 of about 1000 tokens, chosen with the first question in view, or before any."""
    full, ours = _cells(bench, "full"), _cells(bench, SNAPKV)
    share = {cell: right / full.cells()[cell] for cell, right in ours.cells().items()}
    later = max(share[f"turn {turn}"] for turn in (3, 4, 5))
    return Outcome(
        measured=f"full: {full}; {SNAPKV}: {ours}; of full: "
        + ", ".join(f"{cell} {x:.0%}" for cell, x in share.items())
        + f"; of turns 3 to 5 at most {later:.0%}",
        met=share["turn 1"] >= 0.8 and later <= 0.5 and share["requests"] <= 0.5,
    )


def _holds(bench: Bench, method: str) -> Outcome:
    full, ours = _cells(bench, "full"), _cells(bench, method)
    share = {cell: right / full.cells()[cell] for cell, right in ours.cells().items()}
    return Outcome(
        measured=f"{method}: {ours}; of full: " + ", ".join(f"{cell} {x:.0%}" for cell, x in share.items()),
        met=min(share.values()) >= 0.85,
    )


def codes_hold(bench: Bench) -> Outcome:
    """All tokens in 4 bits."""
    return _holds(bench, KIVI)


def loading_holds(bench: Bench) -> Outcome:
    """All tokens held, 128 of them read in a step."""
    return _holds(bench, QUEST)


def last_queries_help(bench: Bench) -> Outcome:
    """A prompt that sees the first and the nearest tokens, and the same whose last queries see all of it."""
    a, tri = _cells(bench, A_SHAPE), _cells(bench, TRI_SHAPE)
    shown = []
    met = True
    for mode in MODES:
        right = [cells.right[mode].mean() for cells in (a, tri)]
        met &= bool(right[1] >= right[0])
        shown.append(f"{mode} {right[0]:.0%} and {right[1]:.0%}")
    return Outcome(
        measured=f"{A_SHAPE}: {a}; {TRI_SHAPE}: {tri}; {', '.join(shown)}",
        met=met,
    )


def important_tokens_differ(bench: Bench, kept: int = 32) -> Outcome:
    """Of the tokens that get most attention from the first question, how many also do from the second: from the last token of each,
    which the answer starts from.
    """
    from trimtab.measure.kv.oracle import overlap

    found = overlap(bench.model, _prompts(bench)[:REQUESTED], kept, last=1)
    layers = np.array(found.by_layer)
    return Outcome(
        measured=f"{found.share:.0%} of {kept} tokens ({found.chance:.0%} by chance), layers {layers.min():.0%} to "
        f"{layers.max():.0%}; they hold {found.mass:.0%} of the second question's attention; {found.pairs} pairs",
        met=found.chance < found.share < 1,
    )


# --------------------------------------------------------------------------------------------------------------- reuse


def contexts_are_prefilled_once(bench: Bench) -> Outcome:
    """Tokens of prefills and of questions, counted by the runs and by hand."""
    shown, met = [], True
    for method in ("full", SNAPKV, KIVI):
        cells = _cells(bench, method)
        for mode in MODES:
            runs, prompts = cells.runs[mode], _prompts(bench)[: len(cells.runs[mode])]
            prefilled, recomputed = (
                sum(getattr(one, name) for one in runs) for name in ("prefill_tokens", "recompute_tokens")
            )
            wanted = sum(len(prompt.context) for prompt in prompts)
            if mode == "multi-turn":
                wanted += sum(len(prompt.turns[0].question) for prompt in prompts)
            met &= prefilled == wanted < recomputed
            if method == "full":
                shown.append(f"{mode} {prefilled:,} tokens for {len(runs)} contexts, {recomputed:,} if started anew")
    return Outcome(measured="; ".join(shown), met=met)


def reset_is_exact(bench: Bench, tokens: int = 600) -> Outcome:
    """One question asked twice with another one in between, from a mark: logits to the bit, in both engines."""
    from trimtab.measure.kv.engines import engine_of
    from trimtab.measure.kv.modes import Track
    from trimtab.techniques.apply import applied

    (prompt,) = _prompts(bench, TASK, tokens, 1, 3)
    shown, met = [], True
    for method in RESET:
        with applied(bench.model, *([] if method == "full" else [method])) as model:
            native, why = engine_of(model)
            engines = [("torch", model.runner())] + ([] if why else [("native", native.runner())])
            for name, runner in engines:
                track = Track(runner, prompt.most_tokens + 100)
                track.prefill(prompt.context)
                start, rows, held = track.mark(), [], []
                for turn in (0, 1, 0):
                    asked = prompt.turns[turn]
                    held.append(track.session.store.nbytes(track.session.seqs[0]))
                    rows.append(np.stack([track.extend(asked.alone), *(track.decode(token) for token in asked.gold)]))
                    track.reset(start)
                track.release(start)
                track.session.close()
                same = np.array_equal(rows[0], rows[2]) and held[0] == held[2]
                met &= same and not np.array_equal(rows[0], rows[1])
                if not same:
                    shown.append(f"{method} ({name}) differs")
            if why:
                shown.append(f"{method} in PyTorch alone")
    return Outcome(measured=f"{len(RESET)} methods" + "".join(f"; {one}" for one in shown), met=met)


def histories_differ(bench: Bench) -> Outcome:
    """Questions the model gets wrong: what stays in the history, and what that does to the next answer."""
    from trimtab.measure.kv.engines import engine_of
    from trimtab.measure.kv.modes import HISTORIES, run

    (prompt,) = _prompts(bench, "mf", 300, 1, 3)
    runner, tokenizer = engine_of(bench.model)[0].runner(), bench.model.tokenizer
    found = {history: run(runner, prompt, tokenizer, history=history) for history in HISTORIES}
    kept = {history: [answer.history for answer in one.answers] for history, one in found.items()}
    nll = {history: [answer.nll_nats for answer in one.answers] for history, one in found.items()}
    golden = [tokenizer.decode(list(asked.gold)) for asked in prompt.turns]
    same_start = nll["golden"][0] == nll["own"][0]
    return Outcome(
        measured=f"golden {kept['golden']}, own {kept['own']}; nll of the later answers {nll['golden'][1]:.2f} and {nll['own'][1]:.2f}",
        met=kept["golden"] == golden != kept["own"] and same_start and nll["golden"][1:] != nll["own"][1:],
    )


def scorers_follow_the_rules(bench: Bench) -> Outcome:
    """Answers whose score the rules of the reference settle: right, nearly right, wrong."""
    from trimtab.measure.kv.dialogue import Turn
    from trimtab.measure.kv.scorers import score

    code = "def f(a):\n    b = a + 1\n    c = b * 2\n    d = c - a\n    return d / b"
    cases = (
        ("substring", 'the value is "4821".', ("4821",), 1), ("substring", "AB", ("ab",), 0),
        ("contained", "it was RED", ("red", "blue"), 1), ("contained", "green", ("red",), 0),
        ("match-all", "ab, CD", ("AB", "CD", "EF"), 0.67), ("match-all", "AB CD EF", ("EF", "AB", "CD"), 1),
        ("first-integer", "is 4821 and 77", ("4821",), 1), ("first-integer", "48215", ("4821",), 0),
        ("first-number", "about 12.7", ("12",), 1), ("first-number", "about 12.7", ("12.5",), 0),
        ("choice", "So the answer is B.", ("the sea", "B"), 1), ("choice", "C", ("the sea", "B"), 0),
        ("qa-f1", "The red, house!", ("a red house",), 1), ("rouge-l", "the cat sat down", ("the cat lay down",), 0.75),
        ("similarity", f"```python\n{code}\n```\nDone.", (code,), 1), ("similarity", "return b", (code,), 0),
    )  # fmt: skip
    wrong = [
        f"{rule}: {said!r}"
        for rule, said, answers, wanted in cases
        if abs(score(Turn(question="?", answers=answers, scorer=rule, max_new_tokens=9), said) - wanted) > 1e-9
    ]
    return Outcome(
        measured=f"{len(cases) - len(wrong)} of {len(cases)}{''.join(f'; {one}' for one in wrong)}", met=not wrong
    )


# ----------------------------------------------------------------------------------------------------------- the table


def life_cycle_is_the_papers(bench: Bench) -> Outcome:
    """Stage, cache, prefill and decode of every method of the paper's table that is here, found by pricing."""
    from trimtab.measure.kv.taxonomy import PAPER, absent, life_cycle

    have = sorted(set(PAPER) - set(absent()))
    wrong = [f"{name}: {life_cycle(name).classes}" for name in have if life_cycle(name).classes != PAPER[name]]
    return Outcome(
        predicted=f"{len(have) - len(wrong)} of {len(have)} agree ({', '.join(have)})"
        + "".join(f"; not {one}" for one in wrong)
        + (f"; not built: {', '.join(absent())}" if absent() else ""),
        met=not wrong and len(have) >= len(PAPER) - 1,
    )


def refuses_bad_input(bench: Bench) -> Outcome:
    """Contexts beyond the model's, more questions than facts, a method that would see a question nobody has asked yet."""
    from trimtab.measure.kv.request import Request, check
    from trimtab.measure.kv.tasks import dialogues

    spec, tokenizer = bench.model.spec, bench.model.tokenizer
    cases: dict[str, tuple[Any, str]] = {
        "len": (lambda: check(Request(lengths=(9000,)), spec), "len=9000"),
        "turns": (lambda: dialogues("kv", tokenizer, tokens=128, turns=9, count=1, seed=0), "turns=9"),
        "prompt ids": (
            lambda: check(Request(methods=("gemfilter:layer=14,topk=128",), modes=("multi-request",)), spec),
            "--mode multi-turn",
        ),
    }
    accepted = []
    for case, (call, words) in cases.items():
        try:
            call()
            accepted.append(case)
        except SpecError as error:
            if words not in str(error):
                accepted.append(f"{case} ({error})")
    return Outcome(
        measured=f"{len(cases) - len(accepted)} of {len(cases)} refused{''.join(f'; {one}' for one in accepted)}",
        met=not accepted,
    )


LINES = (
    Line(
        id="a1", text="generators; full cache on kv, 1K tokens, turns 1 to 5", needed="repeat; >= 90 % each", check=full_cache_answers
    ),
    Line(id="a2", text="a task beyond the model", needed="says so", check=says_what_it_cannot_do),
    Line(id="a3", text="such tasks on a model trained on recall", needed=">= 90 %", check=trained_on_recall),
    Line(
        id="a4", text="SnapKV, 256 of 1000 tokens: turn 1; turns 3 to 5 and requests", needed=">= 80 % of full; <= 50 %",
        check=eviction_fails_the_second_turn,
    ),
    Line(id="a5", text="KIVI, 4 bits", needed=">= 85 % of full everywhere", check=codes_hold),
    Line(id="a6", text="Quest, 128 tokens", needed=">= 85 % of full everywhere", check=loading_holds),
    Line(id="a7", text="Tri-shape and A-shape", needed="Tri-shape >= A-shape", check=last_queries_help),
    Line(id="a8", text="tokens that matter to one question and to the next", needed="reported", check=important_tokens_differ),
    Line(id="a9", text="tokens of prefills", needed="each context once", check=contexts_are_prefilled_once),
    Line(id="a10", text="a question asked again after a reset", needed="equal bits, codes and evictions too", check=reset_is_exact),
    Line(id="a11", text="golden and own history", needed="transcripts differ", check=histories_differ),
    Line(id="a12", text="scorers", needed="the rules of the reference", check=scorers_follow_the_rules),
    Line(id="b1", text="life-cycle table of the methods here", needed="the paper's", check=life_cycle_is_the_papers),
    Line(
        id="c1", text="len beyond the context, turns beyond the facts, gemfilter in multi-request", needed="refused with a sentence",
        check=refuses_bad_input,
    ),
)  # fmt: skip
