"""The scheduler, one rule at a time."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import SpecError, TrimtabError
from trimtab.sched import (
    Admitted,
    Ended,
    Load,
    ModelledExecutor,
    Outcome,
    PrefixIndex,
    Refusal,
    Request,
    Scheduler,
    SchedulerConfig,
    StepWork,
    Trace,
    block_hashes,
    cache_bytes,
    lengths,
    replay,
)
from trimtab.sched.kv import KVBudget
from trimtab.spec.configs import spec_from_config

BLOCK = 4


def seconds(n_prefill: int, prefill_context: int, n_decode: int, context_sum: int) -> float:
    return 0.01 * n_prefill + 0.001 * n_decode


def make(capacity: int = 1000, **fields: Any) -> Scheduler:
    """A scheduler of one byte a token."""
    more = {name: fields.pop(name) for name in ("tokens_per_s", "trace", "seconds", "shared_bytes") if name in fields}
    config = SchedulerConfig(**{"max_running": 4, "max_step_tokens": 16, "block_tokens": BLOCK, **fields})
    return Scheduler(config, capacity_bytes=capacity, nbytes=lambda tokens: tokens, **more)


def ask(id: str, prompt: Any = 8, **fields: Any) -> Request:
    return Request(id=id, prompt=range(prompt) if isinstance(prompt, int) else prompt, **fields)


def model(tokens: int = 100) -> ModelledExecutor:
    return ModelledExecutor(seconds, lengths(lambda *_: tokens))


def drive(
    scheduler: Scheduler, executor: ModelledExecutor, steps: int = 1000, now: float = 0.0
) -> tuple[list[StepWork], list[Ended]]:
    works, ended = [], []
    while scheduler.busy and len(works) < steps:
        works.append(scheduler.step(now))
        ended += [*works[-1].ended, *scheduler.commit(works[-1], executor.run(works[-1]))]
    return works, ended


def rows(work: StepWork) -> list[tuple[int, int, int]]:
    return [(row.seq, row.first, row.count) for row in work.rows]


# Budget.


def test_answers_come_first_and_prompts_fill_the_rest() -> None:
    scheduler, executor = make(), model()
    scheduler.submit(ask("a", 10), 0.0)
    scheduler.submit(ask("b", 30), 0.0)
    works, _ = drive(scheduler, executor, 3)
    assert rows(works[0]) == [(0, 0, 10), (1, 0, 6)]
    assert rows(works[1]) == [(0, 10, 1), (1, 6, 15)]
    assert rows(works[2]) == [(0, 11, 1), (1, 21, 9)]
    assert [row.sample for row in works[0].rows] == [(0,), ()]
    assert works[0].load == Load(16, 55 + 21, 0, 0)
    assert works[1].load == Load(15, 15 * 6 + 120, 1, 11)


def test_a_target_of_seconds_limits_prompts_but_not_answers() -> None:
    scheduler, executor = make(target_step_s=0.051, seconds=seconds, prefix_cache=False), model()
    scheduler.submit(ask("a", 12, max_tokens=9), 0.0)
    scheduler.submit(ask("b", 3, max_tokens=9), 0.0)
    works, _ = drive(scheduler, executor, 4)
    assert [rows(w) for w in works] == [
        [(1, 0, 2), (0, 0, 3)],
        [(1, 2, 1), (0, 3, 4)],
        [(1, 3, 1), (0, 7, 4)],
        [(1, 4, 1), (0, 11, 1)],
    ]
    assert works[1].load.n_prefill == 5


def test_a_prompt_gets_on_even_past_the_target() -> None:
    scheduler, executor = make(target_step_s=1e-9, seconds=seconds, min_prefill_tokens=3), model()
    scheduler.submit(ask("a", 7), 0.0)
    works, _ = drive(scheduler, executor, 4)
    assert [rows(w)[0][1:] for w in works] == [(0, 3), (3, 3), (6, 1), (7, 1)]


def test_a_short_prompt_passes_a_long_one_that_keeps_half_of_every_step() -> None:
    scheduler, executor = make(capacity=10**6, prefix_cache=False), model()
    scheduler.submit(ask("long", 400), 0.0)
    drive(scheduler, executor, 2)
    for name in ("s1", "s2", "s3"):
        scheduler.submit(ask(name, 12), 0.0)
    works, _ = drive(scheduler, executor, 8)
    firsts = {
        seq: at
        for at, work in enumerate(works)
        for row in work.rows
        for seq in row.sample
        if seq > 0 and row.first < 12
    }
    assert firsts == {1: 1, 2: 3, 3: 4}  # each with what the answers before it leave of a half
    for work in works:
        assert work.load.n_prefill + work.load.n_decode == 16
        assert sum(row.count for row in work.rows if row.seq == 0) >= work.load.n_prefill // 2 > 0


@pytest.mark.parametrize(("slower", "together"), [(1.0, 8), (2.0, 4)])
def test_requests_wait_rather_than_make_answers_slow(slower: float, together: int) -> None:
    scheduler = make(
        answer_step_s=0.0085, seconds=seconds, max_running=12, max_step_tokens=64, capacity=10**6, prefix_cache=False
    )
    executor = ModelledExecutor(lambda *load: slower * seconds(*load), lengths(lambda *_: 40))
    for name in range(30):
        scheduler.submit(ask(f"r{name}", 4, max_tokens=40), 0.0)
    works, ended = drive(scheduler, executor)
    assert len(ended) == 30  # all of them in the end
    assert (
        max(len(work.rows) for work in works) == 8
    )  # 1 ms an answer; what is slower is known once it has been measured
    assert max(len(work.rows) for work in works[60:]) == together

    alone = make(answer_step_s=1e-6, seconds=seconds)
    alone.submit(ask("a"), 0.0)
    assert rows(alone.step(0.0))


def test_steps_that_take_longer_than_predicted_become_shorter() -> None:
    def prompts(slower: float) -> list[int]:
        scheduler = make(target_step_s=0.101, seconds=seconds, prefix_cache=False, max_step_tokens=64, capacity=10**6)
        executor = ModelledExecutor(lambda *load: slower * seconds(*load), lengths(lambda *_: 4))
        scheduler.submit(ask("a", 600, max_tokens=4), 0.0)
        works, _ = drive(scheduler, executor, 30)
        return [work.load.n_prefill for work in works]

    exact, slow = prompts(1.0), prompts(3.0)
    assert set(exact[:20]) == {exact[0]}
    assert slow[0] == exact[0] and abs(slow[25] - exact[0] / 3) <= 1


def test_rows_of_an_answer_do_not_depend_on_others() -> None:
    def answer_rows(others: int) -> list[tuple[int, int]]:
        scheduler, executor = make(max_running=8), model(6)
        scheduler.submit(ask("a", 5), 0.0)
        for other in range(others):
            scheduler.submit(ask(f"o{other}", 9 + other), 0.0)
        works, _ = drive(scheduler, executor)
        return [(row.first, row.count) for work in works for row in work.rows if row.seq == 0]

    assert answer_rows(0) == answer_rows(3) == answer_rows(7)


# Queue.


def test_the_order_is_priority_then_arrival() -> None:
    scheduler = make(max_running=1)
    for id, priority in (("a", 0), ("b", 1), ("c", -1), ("d", 0)):
        scheduler.submit(ask(id, priority=priority, max_tokens=1), 0.0)
    _, ended = drive(scheduler, model())
    assert [end.request for end in ended] == ["c", "a", "d", "b"]


def test_waiting_makes_up_for_priority() -> None:
    scheduler = make(max_running=1, ageing_s=10.0)
    scheduler.submit(ask("old", priority=1, max_tokens=1), 0.0)
    scheduler.submit(ask("passes", max_tokens=1), 9.9)
    scheduler.submit(ask("too late", max_tokens=1), 10.1)
    _, ended = drive(scheduler, model(), now=11.0)
    assert [end.request for end in ended] == ["passes", "old", "too late"]


def test_a_large_request_is_not_passed_by_small_ones() -> None:
    scheduler, executor = make(capacity=60, prefix_cache=False), model(10)
    scheduler.submit(ask("runs", 8, max_tokens=20), 0.0)
    drive(scheduler, executor, 1)
    scheduler.submit(ask("large", 30, max_tokens=10), 0.0)
    scheduler.submit(ask("small", 2, max_tokens=2), 0.0)
    works, _ = drive(scheduler, executor)
    assert [start.request for work in works for start in work.starts] == ["large", "small"]


def test_fair_shares_tenants_and_gives_no_credit_for_idling() -> None:
    scheduler, executor = make(max_running=1, fair=True, prefix_cache=False), model(2)
    for i in range(6):
        scheduler.submit(ask(f"a{i}", tenant="a"), 0.0)
    drive(scheduler, executor, 6)  # tenant a alone for a while
    for i in range(3):
        scheduler.submit(ask(f"b{i}", tenant="b"), 0.0)
    works, _ = drive(scheduler, executor)
    order = "".join(start.request[0] for work in works for start in work.starts)
    assert order == "ababab"  # without the lift b would start with all it has, without fairness a would


def test_answers_count_as_service() -> None:
    scheduler = make(max_running=1, fair=True, prefix_cache=False)
    executor = ModelledExecutor(seconds, lengths(lambda request, _: 10 if request[0] == "a" else 1))
    for i in range(5):
        scheduler.submit(ask(f"a{i}", 2, tenant="a"), 0.0)  # 2 + 2 * 10
        scheduler.submit(ask(f"b{i}", 8, tenant="b"), 0.0)  # 8 + 2 * 1
    works, _ = drive(scheduler, executor)
    assert "".join(start.request[0] for work in works for start in work.starts)[:5] == "abbba"


def test_the_queue_is_bounded() -> None:
    scheduler = make(max_queue=2, max_queue_tokens=20, tokens_per_s=100.0)
    assert scheduler.submit(ask("a"), 0.0) == Admitted("a", 0, 0.0)
    # 8 tokens and an answer of up to 128 wait at 100 tokens a second
    assert scheduler.submit(ask("b"), 0.0) == Admitted("b", 1, pytest.approx(1.36))
    full = scheduler.submit(ask("c", 1), 0.0)
    assert isinstance(full, Refusal) and full.reason == "queue_full" and full.retry_after_s == pytest.approx(1.36)
    scheduler.cancel("b", 0.0)
    tokens = scheduler.submit(ask("c", 13), 0.0)
    assert isinstance(tokens, Refusal) and tokens.reason == "queue_tokens"
    assert "8 tokens wait already; with 13 more they pass the 20 allowed" in tokens.message
    assert tokens.retry_after_s == pytest.approx((1 + 128 / 8) / 100)
    alone = scheduler.submit(ask("d", 21), 0.0)
    assert isinstance(alone, Refusal) and alone.retry_after_s is None and "Shorten" in alone.message
    assert scheduler.counters().rejected == {"queue_full": 1, "queue_tokens": 2}
    assert isinstance(scheduler.submit(ask("c", 12), 0.0), Admitted)


def test_a_long_wait_is_refused_and_a_broken_promise_ends() -> None:
    scheduler, executor = make(max_running=1, max_queue_s=2.0, tokens_per_s=100.0), model()
    scheduler.submit(ask("a", max_tokens=92), 0.0)
    drive(scheduler, executor, 1)
    scheduler.submit(ask("b", max_tokens=392), 0.0)
    wait = scheduler.submit(ask("c", max_tokens=92), 0.0)
    assert isinstance(wait, Refusal) and wait.reason == "queue_seconds" and wait.retry_after_s is not None
    assert 0 < wait.retry_after_s < 3 and "more than the 2 s allowed" in wait.message
    assert scheduler.step(2.0).ended == (Ended("b", "queue_timeout", ("",), 0),)


def test_measured_steps_and_answers_change_the_wait() -> None:
    scheduler, executor = make(max_running=2, prefix_cache=False), model(1)
    assert scheduler.submit(ask("a", 10, max_tokens=10), 0.0) == Admitted("a", 0, None)
    drive(scheduler, executor)  # 10 tokens in 0.1 s; one token of ten was used
    scheduler.submit(ask("b", 10, max_tokens=10), 0.0)
    admitted = scheduler.submit(ask("c"), 0.0)
    assert isinstance(admitted, Admitted)
    share = (0.98 + 0.1) / 1.98
    assert admitted.wait_s == pytest.approx((10 + 10 * share) / 100)


def test_deadlines_end_requests_wherever_they_are() -> None:
    scheduler, executor = make(max_running=1), model()
    scheduler.submit(ask("runs", timeout_s=1.0), 0.0)
    scheduler.submit(ask("waits", timeout_s=0.5), 0.0)
    scheduler.submit(ask("stays"), 0.0)
    drive(scheduler, executor, 2, now=0.4)
    work = scheduler.step(1.0)
    assert [(end.request, end.reason, end.output_tokens) for end in work.ended] == [
        ("waits", "expired", 0),
        ("runs", "expired", 2),
    ]
    assert work.free == (0,) and [start.request for start in work.starts] == ["stays"]


def test_cancel_frees_with_the_next_step() -> None:
    scheduler, executor = make(), model()
    for id in ("early", "late", "waits"):
        scheduler.submit(ask(id, 10, n=2), 0.0)
    first = scheduler.step(0.0)
    scheduler.cancel("early", 0.0)  # while its prompt runs
    scheduler.commit(first, executor.run(first))
    second = scheduler.step(0.0)
    assert second.free == (0, 1) and [end.request for end in second.ended] == ["early"]
    assert all(row.seq not in (0, 1) for row in second.rows)
    scheduler.cancel("waits", 0.0)
    scheduler.commit(second, executor.run(second))
    assert not scheduler.cancel("early", 0.0) and not scheduler.cancel("nobody", 0.0)
    assert scheduler.counters().aborted == {"cancelled": 2}
    third = scheduler.step(0.0)
    assert third.free == (4, 5)
    assert scheduler.counters().kv_bytes == (10 + 128) * 2 - 8  # of "late", whose samples share two blocks


def test_what_was_cancelled_in_flight_does_not_finish_too() -> None:
    scheduler = make()
    scheduler.submit(ask("a", max_tokens=1), 0.0)
    work = scheduler.step(0.0)
    scheduler.cancel("a", 0.0, "client gone")
    assert scheduler.commit(work, Outcome([(1,)])) == ()
    work = scheduler.step(0.0)
    assert work.ended == (Ended("a", "client gone", ("",), 0),) and not work.marks
    assert scheduler.counters().finished == 0 and scheduler.counters().aborted == {"client gone": 1}


# Bytes.


def test_nothing_starts_above_the_capacity() -> None:
    scheduler, executor = make(capacity=50, prefix_cache=False), model()
    scheduler.submit(ask("a", 10, max_tokens=20), 0.0)
    scheduler.submit(ask("b", 6, max_tokens=15), 0.0)
    works, _ = drive(scheduler, executor)
    starts = [(work.number, start.request) for work in works for start in work.starts]
    assert starts == [(0, "a"), (20, "b")]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (ask("r", 30, max_tokens=40), "need 70 B of KV cache; it has 50 B. With this prompt max_tokens=20 fits."),
        (ask("r", 60, max_tokens=40), "Prompt and answer together may have 50 tokens: shorten the prompt."),
        (ask("r", 20, max_tokens=20, n=2), "2 answers of up to 20 tokens need 60 B of KV cache; it has 50 B. With this prompt max_tokens=15 fits."),
        (ask("r", 2, n=9), "n=9 samples at a time are not possible. Allowed: up to 4. Ask several times."),
    ],
)  # fmt: skip
def test_what_never_fits_is_refused_with_what_would(request_: Request, says: str) -> None:
    refusal = make(capacity=50).submit(request_, 0.0)
    assert isinstance(refusal, Refusal) and refusal.reason == "never_fits" and refusal.retry_after_s is None
    assert says in refusal.message


def test_the_last_to_come_is_sent_back_and_recomputed() -> None:
    scheduler, executor = make(capacity=40, reserve_tokens=4, grow_tokens=4, prefix_cache=False), model(20)
    for id in ("a", "b"):
        scheduler.submit(ask(id, 8, max_tokens=20), 0.0)
    works, ended = drive(scheduler, executor)
    sent = next(work for work in works if work.preempt)
    assert sent.preempt == (1,) and not sent.starts
    done = 8 + sum(1 for work in works[: sent.number] for row in work.rows if row.seq == 1 and row.sample)
    again = next(start for work in works[sent.number :] for start in work.starts)
    assert (again.seq, again.tokens) == (1, 0)
    prefill = [row for work in works[sent.number :] for row in work.rows if row.seq == 1][:2]
    assert sum(row.count for row in prefill) in (done, done + 1)  # prompt and answer so far, once more
    assert {end.request: end.output_tokens for end in ended} == {"a": 20, "b": 20}
    assert scheduler.counters().preemptions == 1


def test_less_urgent_requests_are_sent_back_first() -> None:
    scheduler, executor = make(capacity=40, reserve_tokens=4, grow_tokens=4, prefix_cache=False), model(20)
    scheduler.submit(ask("idle", 8, max_tokens=20, priority=1), 0.0)
    scheduler.submit(ask("urgent", 8, max_tokens=20), 0.0)
    works, _ = drive(scheduler, executor)
    urgent = next(s.seq for work in works for s in work.starts if s.request == "urgent")
    assert next(work.preempt for work in works if work.preempt) != (urgent,)


def test_a_request_is_sent_back_so_often_and_no_more() -> None:
    scheduler, executor = (
        make(capacity=60, reserve_tokens=1, grow_tokens=1, max_preemptions=2, prefix_cache=False),
        model(30),
    )
    for number in range(6):
        scheduler.submit(ask(f"r{number}", 6, max_tokens=30), 0.0)
    works, ended = drive(scheduler, executor)
    sent = [seq for work in works for seq in work.preempt]
    assert sent and max(sent.count(seq) for seq in sent) == 2
    assert len(ended) == 6


def test_several_samples_run_the_prompt_once() -> None:
    scheduler, executor = make(), ModelledExecutor(seconds, lengths(lambda _, sample: 2 + sample))
    scheduler.submit(ask("a", 10, n=3), 0.0)
    works, ended = drive(scheduler, executor)
    assert rows(works[0]) == [(0, 0, 10)] and works[0].rows[0].sample == (0, 1, 2)
    assert [(fork.seq, fork.parent, fork.tokens) for fork in works[1].forks] == [(1, 0, 10), (2, 0, 10)]
    assert rows(works[1]) == [(0, 10, 1), (1, 10, 1), (2, 10, 1)]
    assert [work.free for work in works] == [(), (), (0,), (1,), (2,)]
    assert ended == [Ended("a", "finished", ("stop",) * 3, 9)]


def test_a_first_sample_that_ends_at_once_still_lets_the_others_fork() -> None:
    scheduler, executor = make(), ModelledExecutor(seconds, lengths(lambda _, sample: 1 + 2 * sample))
    scheduler.submit(ask("a", 5, n=2), 0.0)
    works, ended = drive(scheduler, executor)
    assert works[1].forks[0].parent == 0 and works[1].free == (0,)  # forks are made before anything is freed
    assert ended == [Ended("a", "finished", ("stop", "stop"), 4)]


def test_a_failed_prompt_ends_all_its_samples() -> None:
    scheduler = make()
    scheduler.submit(ask("a", 20, n=2), 0.0)
    work = scheduler.step(0.0)
    assert scheduler.commit(work, Outcome([()], {0: "error"})) == (Ended("a", "finished", ("error", "error"), 0),)
    work = scheduler.step(0.0)
    assert work.free == (0, 1) and not work.marks and not scheduler.counters().kv_bytes


def test_bytes_come_from_the_description_of_the_cache() -> None:
    config = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    spec = spec_from_config(config, "tiny").with_dtype("float32", "float32")
    nbytes = cache_bytes(spec)
    for tokens in (0, 1, 64, 65, 1000):
        assert nbytes(tokens) == sum(layer.cache.nbytes(tokens).reserved for layer in spec.layers)


def test_a_failed_step_ends_its_requests_and_no_others() -> None:
    scheduler, executor = make(max_running=2), model(3)
    scheduler.submit(ask("answers", 8), 0.0)
    drive(scheduler, executor, 2)
    scheduler.submit(ask("prompt", 20), 0.0)
    scheduler.submit(ask("waits", 8), 0.0)
    work = scheduler.step(0.0)
    ended = scheduler.commit(work, Outcome([()] * len(work.rows), {row.seq: "error" for row in work.rows}))
    assert {(end.request, end.finish) for end in ended} == {("answers", ("error",)), ("prompt", ("error",))}
    works, ended = drive(scheduler, executor)
    assert works[0].free == (0, 1) and not works[0].marks
    assert [(end.request, end.output_tokens) for end in ended] == [("waits", 3)]


# Prefixes.


def test_a_prompt_is_shared_up_to_its_last_token() -> None:
    scheduler, executor = make(), model(1)
    for id, prompt in (("a", range(12)), ("b", range(12)), ("c", range(10)), ("d", [*range(8), 99, 99, 99, 99])):
        scheduler.submit(ask(id, prompt, max_tokens=1), 0.0)
        works, _ = drive(scheduler, executor)
        if id == "a":
            assert works[1].marks[0].tokens == 12
            continue
        start, row = works[0].starts[0], works[0].rows[0]
        # never the whole prompt: one token must run for its logits
        assert (start.mark, start.tokens, row.first, row.count) == (1, 8, 8, len(prompt) - 8)
    counters = scheduler.counters()
    assert (counters.prefix_query_tokens, counters.prefix_hit_tokens) == (12 + 12 + 10 + 12, 24)


def test_the_next_turn_starts_from_the_answer() -> None:
    scheduler, executor = make(), model(6)
    scheduler.submit(ask("a", [50] * 7), 0.0)
    drive(scheduler, executor)
    # the answer is 0 1 2 3 4 5, of which the last was never run: 12 tokens are cached
    scheduler.submit(ask("b", [50] * 7 + [0, 1, 2, 3, 4, 5, 60]), 0.0)
    assert scheduler.step(0.0).starts[0].tokens == 12


def test_prompts_are_cut_at_blocks_where_sequences_cannot_be_cut_back() -> None:
    scheduler, executor = make(rewindable=False, max_step_tokens=10), model(1)
    scheduler.submit(ask("a", 14, max_tokens=1), 0.0)
    works, _ = drive(scheduler, executor)
    assert [rows(work) for work in works] == [[(0, 0, 8)], [(0, 8, 4)], [(0, 12, 2)], []]
    assert [[mark.tokens for mark in work.marks] for work in works] == [[], [8], [12], []]
    scheduler.submit(ask("b", [*range(8), 70, 70], max_tokens=1), 0.0)
    assert scheduler.step(0.0).starts[0][3:5] == (1, 8)  # what was marked there, not part of the longer one


@pytest.mark.parametrize("other", [{"tenant": "t"}, {"adapter": "lora"}, {"reuse": False}])
def test_other_salts_share_nothing(other: dict[str, Any]) -> None:
    scheduler, executor = make(), model(1)
    scheduler.submit(ask("a", 12, max_tokens=1), 0.0)
    drive(scheduler, executor)
    scheduler.submit(ask("b", 12, max_tokens=1, **other), 0.0)
    assert scheduler.step(0.0).starts[0].mark is None


def test_salts_cannot_be_shifted_into_each_other() -> None:
    first, second = ask("a", tenant="a", adapter="bc"), ask("b", tenant="ab", adapter="c")
    assert not set(block_hashes(range(8), 4, first.salt)) & set(block_hashes(range(8), 4, second.salt))


def test_hashes_are_chained_and_resumed() -> None:
    whole = block_hashes([1, 2, 3, 4, 5, 6, 7], 2, b"s")
    assert len(whole) == 3 and len(set(whole)) == 3
    assert block_hashes([9, 2, 3, 4], 2, b"s")[1] != whole[1]
    assert block_hashes([1, 2, 3, 4, 5, 6], 2, b"s", whole[:2]) == whole
    assert block_hashes([7, 7, 7, 7], 2, b"s")[0] != block_hashes([7, 7, 7, 7], 2, b"s")[1]


def test_the_least_recently_used_prefix_goes_first_and_those_in_use_stay() -> None:
    kv = KVBudget(100, lambda tokens: tokens)
    index = PrefixIndex(kv, 4, rewindable=True)
    spans = []
    for first in (0, 100, 200):
        hashes = block_hashes(range(first, first + 8), 4, b"")
        spans.append(index.add(hashes, 8, None, 8))
        kv.used += 8
    longer = index.add([*block_hashes(range(12), 4, b"")], 12, spans[0], 4)
    kv.used += 4
    index.pin(spans[1])
    index.pin(longer)
    index.unpin(longer)
    index.unpin(spans[1])  # used last, and until now
    index.pin(spans[2])
    release: list[int] = []
    assert not index.make_room(100 - 7, release) and not release  # all or nothing: 8 are in use
    assert index.make_room(100 - 19, release) and release == [longer.mark, spans[0].mark]
    assert index.make_room(92, release) and release[2:] == [spans[1].mark]
    assert index.clear() == [] and len(index) == 1
    index.unpin(spans[2])
    assert index.clear() == [spans[2].mark] and kv.used == index.bytes == 0


def test_kept_prefixes_make_room_for_requests() -> None:
    scheduler, executor = make(capacity=40), model(1)
    for id in range(6):
        scheduler.submit(ask(f"r{id}", range(id * 50, id * 50 + 16), max_tokens=4), 0.0)
        drive(scheduler, executor)
    assert scheduler.counters().prefix_bytes == 32
    scheduler.submit(ask("large", range(900, 930), max_tokens=8), 0.0)
    assert len(scheduler.step(0.0).release) == 2


# Life.


def test_drain_refuses_and_finishes() -> None:
    scheduler, executor = make(max_running=1), model(3)
    for id in ("a", "b"):
        scheduler.submit(ask(id), 0.0)
    drive(scheduler, executor, 1)
    scheduler.drain(0.0)
    refusal = scheduler.submit(ask("c"), 0.0)
    assert isinstance(refusal, Refusal) and refusal.reason == "draining" and not scheduler.drained
    _, ended = drive(scheduler, executor)
    assert [end.request for end in ended] == ["a", "b"] and scheduler.drained


def test_drain_can_drop_those_that_wait() -> None:
    scheduler, executor = make(max_running=1), model(3)
    for id in ("a", "b"):
        scheduler.submit(ask(id), 0.0)
    drive(scheduler, executor, 1)
    scheduler.drain(0.0, drop_waiting=True)
    _, ended = drive(scheduler, executor)
    assert [(end.request, end.reason) for end in ended] == [("b", "aborted"), ("a", "finished")]


def test_max_tokens_end_with_length() -> None:
    scheduler = make()
    scheduler.submit(ask("a", max_tokens=3), 0.0)
    _, ended = drive(scheduler, model())
    assert ended == [Ended("a", "finished", ("length",), 3)]


def test_held_bytes_above_the_promise_are_counted() -> None:
    scheduler = make()
    scheduler.submit(ask("a", 8, max_tokens=8), 0.0)
    work = scheduler.step(0.0)
    scheduler.commit(work, Outcome([(1,)], held_bytes=17))
    assert scheduler.counters().overruns == 1 and scheduler.counters().kv_held_bytes == 17


def test_a_replay_does_the_same() -> None:
    trace = Trace()
    scheduler, executor = make(capacity=60, reserve_tokens=2, trace=trace, tokens_per_s=10.0), model(9)
    now = 0.0
    for number in range(30):
        now += 0.013
        scheduler.submit(ask(f"r{number}", 5 + number % 7, max_tokens=12, n=1 + number % 2, timeout_s=1.0), now)
        work = scheduler.step(now)
        now += (outcome := executor.run(work)).seconds
        scheduler.commit(work, outcome)
    scheduler.cancel("r29", now)
    drive(scheduler, executor, now=now)
    same = make(capacity=60, reserve_tokens=2, tokens_per_s=10.0)
    assert replay(trace, same, trace.executor()).work == trace.work
    other = make(capacity=50, reserve_tokens=2, tokens_per_s=10.0)
    assert replay(trace, other, executor=model(9)).work != trace.work
    assert dataclasses.asdict(same.counters()) == dataclasses.asdict(scheduler.counters())


# Mistakes.


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: ask("a", []), "prompt=[] is not possible. Allowed: at least one token. Try prompt=[1]."),
        (lambda: ask(""), "id='' is not possible"),
        (lambda: ask("a", max_tokens=0), "max_tokens=0 is not possible. Allowed: a whole number, 1 or more. Try max_tokens=128."),
        (lambda: ask("a", n=0), "n=0"),
        (lambda: ask("a", priority=1.5), "priority=1.5"),
        (lambda: ask("a", timeout_s=0), "timeout_s=0"),
        (lambda: make(max_running=0), "max_running=0"),
        (lambda: make(max_running=17), "max_step_tokens=16 is not possible with max_running=17"),
        (lambda: make(ageing_s=float("inf")), "so that nothing waits for ever"),
        (lambda: make(reserve_tokens=0), "reserve_tokens=0"),
        (lambda: make(max_queue_s=-1), "max_queue_s=-1"),
        (lambda: make(output_weight=-1.0), "weights of 0 or more"),
        (lambda: make(target_step_s=0.1), "needs to know what a step takes"),
        (lambda: make(capacity=0), "capacity_bytes=0 is not possible"),
        (lambda: Trace.from_json("[1, 2]"), "Line 1 of the trace is no event"),
    ],
)  # fmt: skip
def test_bad_parameters_get_a_sentence(build: Any, says: str) -> None:
    with pytest.raises(SpecError) as error:
        build()
    assert says in str(error.value)


def test_calls_out_of_turn_are_refused() -> None:
    scheduler = make()
    scheduler.submit(ask("a"), 0.0)
    with pytest.raises(SpecError, match="id='a' has not ended"):
        scheduler.submit(ask("a"), 0.0)
    work = scheduler.step(0.0)
    with pytest.raises(TrimtabError, match="has not been committed"):
        scheduler.step(0.0)
    with pytest.raises(SpecError, match="An outcome of 0 rows for a step of 1"):
        scheduler.commit(work, Outcome([]))
    with pytest.raises(SpecError, match="0 tokens for the row of sequence 0, which asked for 1"):
        scheduler.commit(work, Outcome([()]))
    with pytest.raises(SpecError, match="none of that id is known"):
        scheduler.commit(work, Outcome([(1,)], {7: "stop"}))
    scheduler.commit(work, Outcome([(1,)]))
    with pytest.raises(TrimtabError, match="not that of the last step"):
        scheduler.commit(work, Outcome([(1,)]))


def test_the_tokens_of_a_row_are_those_of_prompt_and_answer() -> None:
    scheduler, executor = make(max_step_tokens=6, max_running=2), model()
    scheduler.submit(ask("a", [7, 8, 9, 10, 11, 12, 13]), 0.0)
    seen: list[int] = []
    for _ in range(4):
        work = scheduler.step(0.0)
        for row in work.rows:
            seen += scheduler.tokens(row)
        scheduler.commit(work, executor.run(work))
    assert seen == [7, 8, 9, 10, 11, 12, 13, 0, 1]


def test_the_page_of_the_docs_runs(repository: Path) -> None:
    page = (repository / "docs" / "scheduler.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["ended"] == () and names["scheduler"].counters().finished == 1
    tests = {name for name in re.findall(r"`(test_\w+)`", page)}
    here = "".join(
        (repository / "tests" / file).read_text()
        for file in ("unit/test_sched.py", "property/test_sched_properties.py")
    )
    assert tests and not {name for name in tests if f"def {name}(" not in here}


def test_a_paused_request_is_given_no_rows() -> None:
    trace = Trace()
    scheduler, executor = make(trace=trace, max_running=2), model(30)
    for name in ("a", "b", "c"):
        scheduler.submit(ask(name, 4, max_tokens=30), 0.0)
    drive(scheduler, executor, 2)
    assert scheduler.pause("a", 0.0) and not scheduler.pause("nobody", 0.0)
    works, ended = drive(scheduler, executor, 5)
    assert all(row[0] == 1 for work in works for row in rows(work)) and not ended
    works, ended = drive(scheduler, executor, 80)
    assert [one.request for one in ended] == ["b", "c"] and scheduler.busy and works[-1].idle
    scheduler.pause("a", 1.0, on=False)
    _, ended = drive(scheduler, executor)
    assert [one.request for one in ended] == ["a"] and ended[0].output_tokens == 30
    again = replay(Trace.from_json(trace.to_json()), make(max_running=2), trace.executor())
    assert again.work == trace.work
