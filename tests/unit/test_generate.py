"""The engine, driven by a model of known output: the next token is (token + position) modulo the vocabulary."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from trimtab.errors import SpecError
from trimtab.runtime.engine.generate import Output, Session, generate
from trimtab.runtime.engine.sampling import SamplingParams
from trimtab.runtime.step import Recorder, Step
from trimtab.spec.configs import spec_from_config
from trimtab.spec.model import ModelSpec

VOCABULARY, CONTEXT = 26, 60
END = 25


class Store:
    """Counts the sequences that are open."""

    def __init__(self) -> None:
        self.open_ids: list[int] = []
        self.reserved: list[int] = []

    def open(self, reserve_tokens: int = 0) -> int:
        self.reserved.append(reserve_tokens)
        self.open_ids.append(len(self.reserved))
        return len(self.reserved)

    def free(self, seq: int) -> None:
        self.open_ids.remove(seq)


class Counter:
    """A runner: logits peak at (token + position) % V, with its neighbours next. Remembers its passes."""

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep
        self.passes: list[Step] = []
        self.wanted: list[list[int]] = []
        self.stores: list[Store] = []
        self.fail_at: int | None = None

    @property
    def spec(self) -> ModelSpec:
        return spec_from_config(
            {
                "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 1, "max_position_embeddings": CONTEXT,
            },
            "counter",
        )  # fmt: skip

    def open_store(self) -> Any:
        self.stores.append(Store())
        return self.stores[-1]

    def forward(self, tokens: np.ndarray, step: Step, store: Any, logits_rows: np.ndarray) -> np.ndarray:
        if len(self.passes) == self.fail_at:
            raise KeyboardInterrupt
        self.passes.append(step)
        self.wanted.append(logits_rows.tolist())
        peak = (tokens + step.positions)[logits_rows] % VOCABULARY
        away = np.abs(np.arange(VOCABULARY) - peak[:, None])
        return (-np.minimum(away, VOCABULARY - away)).astype(np.float32)

    def keep_tokens(self, ids: np.ndarray, record: Recorder | None) -> np.ndarray:
        return np.arange(len(ids))[: self.keep]


class Letters:
    """A tokenizer: token 0 is "a", 25 ends the answer."""

    eog_ids = frozenset({END})

    def stream(self) -> Letters:
        return self

    def push(self, token: int) -> str:
        return chr(ord("a") + token)

    def finish(self) -> str:
        return ""


def answer(prompt: Iterable[int], count: int) -> list[int]:
    """What the model says, written down once more."""
    ids = list(prompt)
    start = len(ids)
    for _ in range(count):
        ids.append((ids[-1] + len(ids) - 1) % VOCABULARY)
    return ids[start:]


def run(runner: Counter, prompts: list[list[int]], tokenizer: Any = None, **settings: Any) -> list[Output]:
    arrays = [np.array(prompt, dtype=np.int64) for prompt in prompts]
    return list(generate(runner, arrays, SamplingParams(**settings), tokenizer))[-1]


PROMPTS = [[1], [2, 3, 5, 7, 11], [4, 6, 8, 9, 10, 12, 14, 15, 16, 18, 20, 21]]


#: Three prompts whose answers meet the end token, each after another number of tokens.
ENDING = [[7, 7, 0], [7, 7, 20], [17]]


def test_prompts_run_side_by_side_in_chunks() -> None:
    runner = Counter()
    session = Session(runner, chunk=5)
    logits = session.prefill(PROMPTS, reserve=3)
    assert logits.argmax(-1).tolist() == [answer(prompt, 1)[0] for prompt in PROMPTS]
    shapes = [(np.diff(step.cu).tolist(), step.positions[step.cu[:-1]].tolist()) for step in runner.passes]
    assert shapes == [([1, 5, 5], [0, 0, 0]), ([5], [5]), ([2], [10])]
    assert runner.wanted == [[0, 5], [], [1]]  # the last token of a prompt wants logits, others do not
    assert [step.seqs for step in runner.passes] == [[1, 2, 3], [3], [3]]
    assert session.lengths == [1, 5, 12] and runner.stores[0].reserved == [4, 8, 15]
    assert [step.reaches.tolist() for step in runner.passes] == [[4, 8, 15], [15], [15]]
    session.decode(logits.argmax(-1))
    assert runner.passes[-1].positions.tolist() == [1, 5, 12] and session.lengths == [2, 6, 13]


def test_given_tokens_are_scored_in_one_pass() -> None:
    runner = Counter()
    session = Session(runner)
    session.prefill([[1, 2], [3]])
    found = session.extend([[4, 5], [6, 7, 8]])
    assert found.argmax(-1).tolist() == [6, 8, 7, 9, 11] and session.lengths == [4, 4]


def test_a_batch_answers_as_each_prompt_alone() -> None:
    together = run(Counter(), PROMPTS, max_new_tokens=9)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert list(output.ids) == answer(prompt, 9) == list(run(Counter(), [prompt], max_new_tokens=9)[0].ids)
        assert (output.finish, output.prompt_tokens, output.text) == ("length", len(prompt), "")


def test_every_step_is_shown() -> None:
    steps = list(generate(Counter(), [np.array([3])], SamplingParams(max_new_tokens=4), Letters()))  # type: ignore[arg-type]
    assert [len(outputs[0].ids) for outputs in steps] == [1, 2, 3, 4]
    assert [outputs[0].text for outputs in steps] == ["d", "de", "deg", "degj"]


def test_rows_that_are_done_leave_the_batch() -> None:
    """The row that meets the end token stops being computed and frees its sequence; the others finish."""
    lengths = [next(i for i, token in enumerate(answer(prompt, 40)) if token == END) + 1 for prompt in ENDING]
    assert len(set(lengths)) == 3
    runner = Counter()
    outputs = run(runner, ENDING, Letters(), max_new_tokens=40)
    assert [len(output.ids) for output in outputs] == lengths
    assert all(output.finish == "eos" and output.ids[-1] == END and "z" not in output.text for output in outputs)
    rows = [step.rows for step in runner.passes[1:]]
    assert rows == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert runner.stores[0].open_ids == []
    on = run(Counter(), ENDING[:1], Letters(), max_new_tokens=40, ignore_eos=True)
    assert len(on[0].ids) == 40 and "z" in on[0].text


def test_stop_texts_end_an_answer_and_are_not_part_of_it() -> None:
    text = "".join(chr(97 + token) for token in answer([3], 12))
    stop = text[4:7]
    output = run(Counter(), [[3]], Letters(), max_new_tokens=12, stop=(stop, "no such text"))[0]
    assert (output.text, output.finish, len(output.ids)) == (text[:4], "stop", 7)
    # What looks like the beginning of a stop text is held back, and given out when it is none.
    unfinished = run(Counter(), [[3]], Letters(), max_new_tokens=6, stop=(stop,))[0]
    assert (unfinished.text, unfinished.finish) == (text[:6], "length")


def test_a_token_filter_shortens_the_prompt() -> None:
    runner = Counter(keep=4)
    output = run(runner, [PROMPTS[2]], max_new_tokens=3)[0]
    assert list(output.ids) == answer(PROMPTS[2][:4], 3)  # positions start afresh
    assert runner.passes[0].positions.tolist() == [0, 1, 2, 3] and output.prompt_tokens == 12


def test_sampling_is_the_seeds_own() -> None:
    settings = {"temperature": 3.0, "seed": 5, "max_new_tokens": 8}
    alone = run(Counter(), [PROMPTS[1]], **settings)[0].ids
    assert run(Counter(), PROMPTS, **settings)[1].ids == alone != tuple(answer(PROMPTS[1], 8))
    assert run(Counter(), [PROMPTS[1]], **{**settings, "seed": 6})[0].ids != alone


def test_what_exceeds_the_context_is_refused_before_anything_runs() -> None:
    runner = Counter()
    assert len(run(runner, [[1] * 50], max_new_tokens=10)[0].ids) == 10
    runner = Counter()
    for prompt, new in ((50, 11), (61, 1)):
        with pytest.raises(SpecError, match=rf"{prompt} tokens and {new} new ones exceed the context of counter, 60"):
            run(runner, [[2], [1] * prompt], max_new_tokens=new)
    with pytest.raises(SpecError, match="at most 10"):
        run(runner, [[1] * 50], max_new_tokens=11)
    assert not runner.passes and not runner.stores
    session = Session(runner)
    session.prefill([[1] * 60])
    with pytest.raises(SpecError, match="exceed the context"):
        session.decode([1])


def test_misuse_of_a_session_is_named() -> None:
    with pytest.raises(SpecError, match="chunk=0"):
        Session(Counter(), chunk=0)
    session = Session(Counter())
    with pytest.raises(SpecError, match="Prefill first"):
        session.decode([])
    for prompts in ([], [[1], []]):
        with pytest.raises(SpecError, match="no token"):
            session.prefill(prompts)
    session.prefill([[1], [2]])
    with pytest.raises(SpecError, match="already"):
        session.prefill([[1]])
    for tokens in ([1], [1, 2, 3]):
        with pytest.raises(SpecError, match="each of the 2 rows"):
            session.decode(tokens)
    with pytest.raises(SpecError, match="each of the 2 rows"):
        session.extend([[1], []])


@pytest.mark.parametrize("fail_at", [0, 2])
def test_an_interrupt_frees_the_sequences(fail_at: int) -> None:
    runner = Counter()
    runner.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        run(runner, PROMPTS, max_new_tokens=9)
    assert runner.stores[0].open_ids == [] and len(runner.stores[0].reserved) == 3


def test_leaving_a_stream_early_frees_the_sequences() -> None:
    runner = Counter()
    steps: Iterator[list[Output]] = generate(runner, [np.array([3])], SamplingParams(max_new_tokens=9), None)
    next(steps)
    assert runner.stores[0].open_ids == [1]
    steps.close()  # type: ignore[attr-defined]
    assert runner.stores[0].open_ids == []


def test_the_engine_does_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import trimtab.runtime.engine.generate"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------- a real decoder


class Numbers(Letters):
    """Encodes figures as themselves, writes a token as its number and a space."""

    eog_ids = frozenset()
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [int(word) for word in text.split()]

    def push(self, token: int) -> str:
        return f"{token} "


@pytest.fixture
def talker() -> Any:
    """An untied model: a tied one with random weights only says its last token again."""
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.weights.random import random_weights

    spec = spec_from_config(
        {
            "model_type": "llama", "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
        },
        "talker",
    ).with_dtype("float32")  # fmt: skip
    return Model(Variant(spec, random_weights(spec)), Numbers)  # type: ignore[arg-type]


def test_generate_takes_text_ids_and_batches(talker: Any) -> None:
    rows = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [35]]
    batch = talker.generate(rows, max_new_tokens=6)
    for row, output in zip(rows, batch, strict=True):
        text = " ".join(map(str, row))
        single = talker.generate(row, max_new_tokens=6)
        assert single == output == talker.generate(text, max_new_tokens=6)
        assert output.text == "".join(f"{token} " for token in output.ids) and len(set(output.ids)) > 1
        # Greedy: every token is the likeliest after those before it.
        logits = talker.logits([*row, *output.ids])[0]
        assert logits.argmax(-1)[len(row) - 1 : -1].tolist() == list(output.ids)
        assert "".join(talker.generate(text, max_new_tokens=6, stream=True)) == output.text
    assert talker.generate([" ".join(map(str, row)) for row in rows], max_new_tokens=6) == batch


def test_a_stream_stays_with_the_variant_it_began_on(talker: Any, tiny_materials: Any) -> None:
    from trimtab.techniques.apply import derive
    from trimtab.techniques.registry import parse_all

    wanted = talker.generate([3, 1, 4], max_new_tokens=12).text
    stream = talker.generate([3, 1, 4], max_new_tokens=12, stream=True)
    first = next(stream)
    talker.push(
        derive(talker.variant, parse_all(["rtn:bits=2,group=16", "streaming-llm:sink=1,recent=2"]), tiny_materials)
    )
    assert talker.generate([3, 1, 4], max_new_tokens=12).text != wanted
    assert first + "".join(stream) == wanted


def test_generate_refuses_before_it_computes(talker: Any, tiny_model: Any) -> None:
    for stream in (False, True):
        with pytest.raises(SpecError, match=r"exceed the context of talker, 512"):
            talker.generate([1] * 500, max_new_tokens=13, stream=stream)
    with pytest.raises(SpecError, match="max_new_tokens"):
        talker.generate([1], max_new_tokens=0)
    with pytest.raises(SpecError, match="one prompt"):
        talker.generate([[1], [2]], stream=True)
    with pytest.raises(SpecError, match="no tokenizer"):
        tiny_model.generate("1 2 3")
