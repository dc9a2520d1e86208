"""A lane of the engine on a tiny model: the same tokens whatever else runs, and every page given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.conftest import TEMPLATE, tiny_backend
from tests.serve.engines import COST, Bench, load, write_model
from trimtab.errors import CapacityError
from trimtab.runtime.engine.generate import generate
from trimtab.runtime.engine.sampling import SamplingParams
from trimtab.sched.scheduler import Scheduler
from trimtab.sched.trace import Trace, replay
from trimtab.serve import messages as m
from trimtab.serve.config import ServeConfig
from trimtab.serve.engine.cost import calibrate
from trimtab.serve.engine.models import Models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_backend(), TEMPLATE)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length)


def mixed(count: int) -> list[tuple[str, np.ndarray, dict[str, Any]]]:
    """Requests of all kinds; a third share the beginning of their prompts."""
    rng = np.random.default_rng(7)
    shared = prompt(99, 400)
    found = []
    for index in range(count):
        length = int(rng.choice([1, 2, 17, 64, 65, 200, 500])) if index % 16 else 1500
        ids = prompt(index, length)
        if index % 3 == 0:
            ids = np.concatenate((shared[: int(rng.integers(60, 400))], ids[:50]))
        settings: dict[str, Any] = {"max_tokens": int(rng.integers(1, 20)), "ignore_eos": True}
        kind = index % 8
        if kind == 1:
            settings |= {"temperature": 0.9, "seed": index, "n": 3}
        if kind == 2:
            settings |= {"temperature": 1.2, "seed": index, "top_p": 0.8, "top_k": 50}
        if kind == 3:
            settings |= {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3}
        if kind == 4:
            settings |= {"stop": ("\ufffd", "a"), "logit_bias": ((97, 3.0),)}
        if kind == 5:
            settings |= {"logprobs": 3, "min_p": 0.1, "temperature": 1.0, "seed": index}
        if kind == 6:
            settings |= {"stop_token_ids": tuple(range(0, 250, 9)), "min_tokens": 1}
        found.append((f"r{index}", ids, settings))
    return found


def answers(bench: Bench, name: str, n: int) -> list[tuple[list[int], str, str | None]]:
    return [(bench.ids(name, i), bench.text(name, i), bench.finish(name, i)) for i in range(n)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_mixed_requests_answer_as_each_would_alone(model: Any, deterministic: bool) -> None:
    requests = mixed(64)
    together = Bench(model, deterministic=deterministic)
    alone = Bench(model, prefix_cache=False, deterministic=deterministic)
    for name, ids, settings in requests:
        together.submit(name, ids, **settings)
    cancelled = {"r5", "r20", "r33"}
    for turn in range(4000):
        if turn == 12:
            for name in cancelled:
                together.lane.cancel(name)
        if not together.lane.scheduler.busy:
            break
        together.turn()
    for name, ids, settings in requests:
        if name in cancelled:
            assert isinstance(together.end(name), m.Finished) and together.finish(name) in ("cancelled", "length")
            continue
        alone.submit(name, ids, **settings)
        alone.run()
        n = settings.get("n", 1)
        if settings.get("temperature", 0) and not deterministic:
            continue  # two tokens may be as likely but for the last bits, and change places
        assert answers(together, name, n) == answers(alone, name, n), name
        assert together.end(name).completion_tokens == sum(len(together.ids(name, i)) for i in range(n))
    assert max(len(said.pieces) for said in together.said if isinstance(said, m.Tokens)) > 8  # they did run together
    for bench in (together, alone):
        everything_is_free(bench)


def everything_is_free(bench: Bench) -> None:
    bench.lane.scheduler.clear_prefixes(bench.now)
    bench.run()
    assert bench.lane.executor.store.pages_bytes == 0
    assert not bench.lane.executor.sequences and bench.lane.empty and not bench.lane._choices


def test_greedy_tokens_are_those_of_generate(model: Any) -> None:
    bench = Bench(model)
    for length in (1, 63, 64, 300):
        bench.submit(f"g{length}", prompt(length, length), max_tokens=10, ignore_eos=True)
    bench.run()
    for length in (1, 63, 64, 300):
        params = SamplingParams(max_new_tokens=10, ignore_eos=True)
        (output,) = list(generate(model.runner, [prompt(length, length)], params, None))[-1]
        assert bench.ids(f"g{length}") == list(output.ids)


def test_a_cached_prefix_changes_no_token(model: Any) -> None:
    with_cache, without = Bench(model), Bench(model, prefix_cache=False)
    base = prompt(3, 256)
    for bench in (with_cache, without):
        for index, cut in enumerate((256, 200, 130, 256)):
            bench.submit(f"p{index}", [*base[:cut], *prompt(index, 9)], max_tokens=8)
            bench.run()
    hits = [with_cache.end(f"p{index}").cached_tokens for index in range(4)]
    assert hits == [0, 192, 128, 256] and without.end("p3").cached_tokens == 0
    for index in range(4):
        assert with_cache.ids(f"p{index}") == without.ids(f"p{index}")
    everything_is_free(with_cache)


def test_tenants_share_no_prefix(model: Any) -> None:
    bench = Bench(model)
    for salt in ("a", "b", "a"):
        bench.submit(f"{salt}{len(bench.said)}", prompt(3, 200), salt=salt)
        bench.run()
    cached = [said.cached_tokens for said in bench.said if isinstance(said, m.Finished)]
    assert cached == [0, 0, 192]


def test_preemption_changes_no_token(model: Any) -> None:
    bound = Bench(model).lane.scheduler.kv.nbytes
    tight, roomy = Bench(model, kv_bytes=3 * bound(400), prefix_cache=False), Bench(model)
    for bench in (tight, roomy):
        for index in range(6):
            settings = {"temperature": 1.0, "seed": index, "top_k": 2} if index % 2 else {}
            bench.submit(f"q{index}", prompt(index, 100), max_tokens=300, ignore_eos=True, **settings)
        bench.run(20000)
    assert sum(tight.end(f"q{index}").preemptions for index in range(6)) > 0
    assert tight.lane.scheduler.counters().overruns == 0
    for index in range(6):
        assert tight.ids(f"q{index}") == roomy.ids(f"q{index}") and len(tight.ids(f"q{index}")) == 300
    everything_is_free(tight)


def test_cancel_frees_within_two_steps(model: Any) -> None:
    bench = Bench(model, prefix_cache=False)
    bench.submit("c", prompt(1, 300), max_tokens=500, n=2, ignore_eos=True, temperature=1.0)
    for _ in range(8):
        bench.turn()
    assert bench.lane.executor.store.pages_bytes > 0
    bench.lane.cancel("c")
    bench.turn()
    bench.turn()
    assert bench.lane.executor.store.pages_bytes == 0 and bench.lane.empty
    assert bench.finish("c", 0) == bench.finish("c", 1) == "cancelled"
    assert bench.end("c").completion_tokens == len(bench.ids("c", 0)) + len(bench.ids("c", 1)) > 0


def test_a_deadline_ends_a_request(model: Any) -> None:
    bench = Bench(model)
    bench.submit("d", prompt(1, 5), max_tokens=1000, ignore_eos=True, deadline_s=0.02)
    bench.run()
    assert bench.finish("d") == "deadline" and 5 < len(bench.ids("d")) < 40
    everything_is_free(bench)


def test_a_paused_request_gets_no_rows(model: Any) -> None:
    bench = Bench(model)
    for name in ("a", "b"):
        bench.submit(name, prompt(1, 5), max_tokens=20, ignore_eos=True)
    for _ in range(3):
        bench.turn()
    bench.lane.pause("a", True)
    held = len(bench.ids("a"))
    for _ in range(30):
        bench.turn()
    assert len(bench.ids("a")) == held and bench.finish("b") == "length"
    assert bench.lane.stalled and not bench.lane.ready and bench.lane.paused == {"a"}
    bench.lane.pause("a", False)
    bench.run()
    assert bench.ids("a") == bench.ids("b") and not bench.lane.paused
    bench.submit("c", prompt(1, 5), max_tokens=20)
    bench.lane.pause("c", True)
    bench.turn()
    bench.lane.cancel("c")
    bench.run()
    assert bench.finish("c") == "cancelled"


def test_a_trace_replayed_gives_the_same_work(model: Any) -> None:
    trace = Trace()
    bound = Bench(model).lane.scheduler.kv.nbytes
    bench = Bench(model, trace=trace, kv_bytes=2 * bound(1600))
    for index, (name, ids, settings) in enumerate(mixed(24)):
        bench.submit(name, ids, **settings)
        bench.turn()
        if index == 9:
            bench.lane.pause("r8", True)
        if index == 14:
            bench.lane.pause("r8", False)
            bench.lane.cancel("r12")
    bench.run()
    trace = Trace.from_json(trace.to_json())
    old = bench.lane.scheduler
    again = Scheduler(old.config, capacity_bytes=old.kv.capacity, nbytes=old.kv._raw, seconds=COST)
    driven = replay(trace, again, trace.executor())
    assert driven.work == trace.work and len(driven.work) > 30
    assert any(work.forks for work in driven.work) and any(start.mark for work in driven.work for start in work.starts)


def test_log_probabilities_are_those_of_the_raw_logits(model: Any) -> None:
    bench, ids = Bench(model), prompt(5, 40)
    bench.submit(
        "l", ids, max_tokens=5, logprobs=4, prompt_logprobs=2, logit_bias=((3, 100.0),), repetition_penalty=2.0
    )
    bench.submit("s", ids, max_tokens=0, prompt_logprobs=0)
    bench.run()
    made = bench.ids("l")
    assert made == [3] * 5
    whole = np.array([*ids, *made])
    from trimtab.runtime.step import Step

    store = model.runner.open_store()
    step = Step.of([len(whole)], [0], [store.open()], None, [len(whole)], [False])
    logits = model.runner.forward(whole, step, store, np.arange(len(whole))).astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    expected = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    entries = [entry for piece in bench.pieces("l") for entry in piece.logprobs]
    for place, entry in enumerate(entries):
        row = expected[len(ids) - 1 + place]
        assert entry.id == 3 and abs(entry.logprob - row[3]) < 1e-4
        assert [token for token, _ in entry.top] == np.argsort(-row, kind="stable")[:4].tolist()
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(row)[::-1][:4], atol=1e-4)
    for name, count in (("l", 2), ("s", 0)):
        found = bench.end(name).prompt_logprobs
        assert [entry.id for entry in found] == ids[1:].tolist() and {len(entry.top) for entry in found} == {count}
        np.testing.assert_allclose([e.logprob for e in found], expected[np.arange(39), ids[1:]], atol=1e-4)
    assert bench.end("s").completion_tokens == 0 and not bench.ids("s")


def test_the_best_of_several_is_sent_alone(model: Any) -> None:
    bench = Bench(model)
    bench.submit("all", prompt(4, 20), n=5, best_of=5, temperature=1.5, seed=3, logprobs=0, ignore_eos=True)
    bench.submit("best", prompt(4, 20), n=2, best_of=5, temperature=1.5, seed=3, ignore_eos=True)
    bench.run()
    means = [np.mean([e.logprob for p in bench.pieces("all", i) for e in p.logprobs]) for i in range(5)]
    order = np.argsort(means)[::-1]
    assert [bench.ids("best", i) for i in (0, 1)] == [bench.ids("all", int(i)) for i in order[:2]]
    assert not bench.pieces("best", 2) and bench.end("best").completion_tokens == 60


SCHEMA = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
}  # fmt: skip


def test_grammars_are_followed_by_every_choice(model: Any) -> None:
    pytest.importorskip("llguidance")
    bench = Bench(model)
    grammar = m.Grammar("json_schema", json.dumps(SCHEMA))
    for index in range(4):
        bench.submit(f"j{index}", prompt(index, 9), grammar=grammar, max_tokens=400, temperature=1.0, seed=index, n=2,
                     logit_bias=((32, -100.0), (10, -100.0), (9, -100.0), (13, -100.0)))  # fmt: skip
    bench.submit("x", prompt(1, 3), grammar=m.Grammar("regex", "[ab]{3}c"), temperature=1.0, seed=1)
    bench.submit("y", prompt(1, 3), grammar=m.Grammar("lark", 'start: "yes" | "no"'), temperature=1.0, seed=1)
    bench.submit(
        "z", prompt(1, 3), grammar=m.Grammar("lark", 'start: "yes" | "no"'), logit_bias=((121, -100.0), (110, -100.0))
    )
    bench.submit("broken", prompt(1, 3), grammar=m.Grammar("regex", "(("))
    bench.run()
    for index in range(4):
        for choice in (0, 1):
            value = json.loads(bench.text(f"j{index}", choice))
            assert set(value) == {"name", "age"} and 0 <= value["age"] <= 120
            assert bench.finish(f"j{index}", choice) == "stop"
    assert bench.text("x")[3] == "c" and bench.text("y") in ("yes", "no")
    assert bench.finish("z") == "stop" and bench.ids("z") == []  # nothing was allowed
    assert bench.end("broken").status == 400
    assert len(model.base.grammars) == 3
    everything_is_free(bench)


def test_who_waited_too_long_is_told_to_come_back(model: Any) -> None:
    bench = Bench(model, max_sequences=1, max_queue_s=0.5)
    bench.submit("first", prompt(1, 40), max_tokens=200, ignore_eos=True)
    bench.turn()
    bench.submit("second", prompt(2, 40))
    bench.turn()
    bench.now += 0.6
    bench.turn()
    bench.turn()
    refused = bench.end("second")
    assert isinstance(refused, m.Refused) and refused.status == 429
    assert refused.retry_after_s is not None and refused.retry_after_s >= 0
    bench.submit("third", prompt(3, 40))
    bench.lane.drain()
    bench.run()
    assert bench.end("first").completion_tokens == 200
    everything_is_free(bench)


def test_what_cannot_be_is_refused(model: Any) -> None:
    bench = Bench(model, kv_bytes=256 << 10, max_queue=2)
    bench.submit("long", prompt(1, 2000), max_tokens=100)
    bench.submit("big", prompt(1, 1500), max_tokens=100)
    bench.submit("id", [700], max_tokens=1)
    bench.submit("none", [], max_tokens=1)
    for index in range(3):
        bench.submit(f"f{index}", prompt(1, 3))
    bench.submit("f0", prompt(1, 3))
    refused = {said.id: said for said in bench.said if isinstance(said, m.Refused)}
    assert {name: said.status for name, said in refused.items()} == {
        "long": 400, "big": 413, "id": 400, "none": 400, "f2": 429, "f0": 400,
    }  # fmt: skip
    assert refused["f2"].retry_after_s and all(said.message.endswith((".", "?")) for said in refused.values())
    bench.run()


class Faulty:
    """A runner that breaks on one token, and whose logits are NaN after another."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, tokens: Any, step: Any, store: Any, rows: Any) -> Any:
        if 250 in tokens:
            raise CapacityError("a planted fault")
        logits = self._runner.forward(tokens, step, store, rows)
        logits[tokens[rows] == 251] = np.nan
        return logits


def test_a_request_that_breaks_breaks_alone(model: Any) -> None:
    import dataclasses

    broken = dataclasses.replace(model, runner=Faulty(model.runner))
    bench, sound = Bench(broken), Bench(model)
    for at in (bench, sound):
        at.submit("good", [1, 2, 3], max_tokens=30, logit_bias=((250, -100.0), (251, -100.0)), ignore_eos=True)
    bench.turn()
    bench.submit("bad", [5, 250, 6])
    bench.submit("nan", [5, 6, 251], n=2)
    for at in (bench, sound):
        at.run()
    assert isinstance(bench.end("bad"), m.Failed) and "planted" in bench.end("bad").message
    assert isinstance(bench.end("nan"), m.Failed)
    assert bench.ids("good") == sound.ids("good") and len(bench.ids("good")) == 30
    everything_is_free(bench)


def test_deterministic_answers_are_equal_to_the_bit(model: Any) -> None:
    settings = dict(max_tokens=12, logprobs=2, prompt_logprobs=1, ignore_eos=True, temperature=1.0, seed=4)
    alone, crowd = Bench(model, deterministic=True), Bench(model, deterministic=True, step_tokens=33)
    alone.submit("x", prompt(1, 130), **settings)
    alone.run()
    for index in range(16):
        crowd.submit(f"o{index}", prompt(index, 5 + 37 * (index % 4)), max_tokens=25, temperature=1.0)
        crowd.turn()
    crowd.submit("x", prompt(1, 130), **settings)
    crowd.run()
    assert [p.logprobs for p in alone.pieces("x")] == [p.logprobs for p in crowd.pieces("x")]
    assert (
        alone.end("x").prompt_logprobs == crowd.end("x").prompt_logprobs and len(alone.end("x").prompt_logprobs) == 129
    )
    for bench in (alone, crowd):
        everything_is_free(bench)


def test_a_lane_runs_on_the_torch_decoder(folder: Path, model: Any) -> None:
    models = Models(ServeConfig(models=(str(folder),), threads=1).start())
    base = models.load(str(folder)).base
    torch, native = Bench(models._torch(str(folder), base, (), "asked for")), Bench(model)
    for bench in (torch, native):
        for index in range(3):
            bench.submit(f"t{index}", [*prompt(1, 150), *prompt(index, 20 * index)], max_tokens=6, n=2)
            bench.turn()
        bench.run()
    assert torch.lane.model.info.runs == "torch" and torch.end("t2").cached_tokens == 128
    for index in range(3):
        assert torch.ids(f"t{index}") == torch.ids(f"t{index}", 1) == native.ids(f"t{index}")
    everything_is_free(torch)


def test_slots_bound_rows_and_lengths(folder: Path) -> None:
    """A cache in slots runs as many sequences as it has slots, and answers what pages answer; marks and forks take none for good."""
    name = f"{folder}@vattn:max_batch=5,max_len=256,page=4096"
    served = Models(ServeConfig(models=(name,), threads=1).start()).load(name)
    assert served.info.context == 256
    assert calibrate(served.runner).base_s > 0
    plain, slots = Bench(load(folder)), Bench(served)
    assert slots.lane.scheduler.config.max_running == 5
    shared = prompt(3, 150)
    for bench in (plain, slots):
        for index in range(12):
            bench.submit(
                f"r{index}", np.concatenate((shared, prompt(index, 20 + index))), ignore_eos=True, max_tokens=9
            )
        bench.run()
    for index in range(12):
        assert slots.ids(f"r{index}") == plain.ids(f"r{index}") and len(slots.ids(f"r{index}")) == 9
    assert slots.lane.scheduler.counters().prefix_hit_tokens > 0
