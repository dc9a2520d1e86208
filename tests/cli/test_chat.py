"""`trimtab chat`: a conversation keeps its cache from turn to turn, and its terminal survives Ctrl-C."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("starlette")

from tests.serve.conftest import TEMPLATE, tiny_backend
from tests.serve.engines import CONFIG, write_model
from trimtab.cli.main import main
from trimtab.errors import SpecError
from trimtab.runtime.engine.sampling import SamplingParams
from trimtab.runtime.engine.talk import Talk, Turn
from trimtab.techniques.apply import load_engine
from trimtab.ui.chat import converse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_backend(), TEMPLATE)


def load(folder: Path, *techniques: str) -> Any:
    return load_engine(folder, techniques=techniques, threads=1)[0]


def talk(folder: Path, *techniques: str, gen: int = 24, system: str = "", **options: Any) -> Talk:
    return Talk(load(folder, *techniques), SamplingParams(max_new_tokens=gen, ignore_eos=True, **options), system)


def alone(model: Any, ids: list[int], gen: int, **options: Any) -> str:
    return model.generate(ids, max_new_tokens=gen, ignore_eos=True, **options).text


@pytest.mark.parametrize("technique", [(), ("kivi:bits=4,group=16,residual=32",)])
def test_a_turn_runs_only_what_is_new_and_answers_the_same(folder: Path, technique: tuple[str, ...]) -> None:
    talking, model, seen = talk(folder, *technique, system="Be brief."), load(folder), 0
    for text in ("Hello there", "And then?", "Go on, please"):
        said = "".join(talking.say(text))
        turn = talking.turn
        assert turn.finish == "length" and turn.new_tokens == 24
        assert turn.run_tokens == turn.prompt_tokens - seen
        if seen:
            assert turn.run_tokens < 60 < seen
        if not technique:  # codes of a cache depend on where a prompt was cut; plain ones do not
            prompt = talking._ids[: turn.prompt_tokens]
            assert said == alone(model, prompt, 24)
        seen = turn.prompt_tokens + turn.new_tokens
        assert talking._session is not None and talking._session.lengths == [seen] == [len(talking._ids)]
        assert talking.messages[-1] == {"role": "assistant", "content": said}
    talking.reset()
    assert talking.messages == [{"role": "system", "content": "Be brief."}]
    "".join(talking.say("Hello there"))
    assert talking.turn.run_tokens == talking.turn.prompt_tokens


@pytest.mark.parametrize("technique", [(), ("kivi:bits=4,group=16,residual=32",)])
def test_after_a_stop_text_the_cache_goes_back_or_is_made_again(folder: Path, technique: tuple[str, ...]) -> None:
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    first = "".join(talk(folder, *technique, **drawn).say("Hello there"))
    assert len(first) > 8
    talking = talk(folder, *technique, stop=(first[5:7],), **drawn)
    assert "".join(talking.say("Hello there")) == first[: first.index(first[5:7])] and talking.turn.finish == "stop"
    again = talk(folder, *technique, **drawn)
    again.messages = list(talking.messages)
    again._rng = copy.deepcopy(talking._rng)
    said, alone_said = "".join(talking.say("What?")), "".join(again.say("What?"))
    assert talking.turn.prompt_tokens == again.turn.prompt_tokens == again.turn.run_tokens
    if technique:  # what was coded cannot be had back
        assert talking.turn.run_tokens == talking.turn.prompt_tokens and said == alone_said.partition(first[5:7])[0]
    else:
        assert talking.turn.run_tokens < 40 and said == alone_said.partition(first[5:7])[0]


def test_an_answer_that_was_stopped_can_be_gone_on_from(folder: Path) -> None:
    talking, model = talk(folder), load(folder)
    left = iter([True] * 8)
    said = "".join(talking.say("Hello there", lambda: next(left, False)))
    assert talking.turn.finish == "interrupted" and talking.turn.new_tokens == 7 and said
    more = "".join(talking.say("And then?"))
    assert more == alone(model, talking._ids[: talking.turn.prompt_tokens], 24)
    assert talking.messages[1]["content"] == said

    fresh = talk(folder)
    assert "".join(fresh.say("x" * 700, iter([True, False]).__next__)) == ""  # in the middle of the prompt
    assert fresh.messages == [] and len(fresh._ids) == 512
    assert "".join(fresh.say("Hello there")) == "".join(talk(folder).say("Hello there"))


def test_drawing_goes_on_from_turn_to_turn(folder: Path) -> None:
    def answers() -> list[str]:
        talking, said = talk(folder, temperature=1.0, seed=5), []
        for _ in range(2):
            said.append("".join(talking.say("Hello there")))
            talking.reset()  # the same prompt again, but not the same numbers
        return said

    assert answers() == answers() and len(set(answers())) == 2


def test_a_conversation_longer_than_the_context_is_refused(folder: Path) -> None:
    talking = talk(folder, gen=64)
    with pytest.raises(SpecError, match=r"/reset"):
        "".join(talking.say("x" * CONFIG["max_position_embeddings"]))
    assert "".join(talking.say("Hello there"))


def test_lines_are_turns_and_speed_is_told_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "chat", str(folder), "--gen", "8", "--threads", "1", "--system", "x"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/nothing\n/reset\nHello\n/exit\nnever\n"))
    with pytest.raises(SystemExit) as stopped:
        main()
    found = capsys.readouterr()
    assert not stopped.value.code
    assert found.out.count("\n") >= 2 and found.out[: len(found.out) // 2] == found.out[len(found.out) // 2 :]
    ran, _, of = found.err.partition("; ")[2].split()[:3]
    assert ran == of  # after /reset nothing was in the cache
    assert "2 answers, 16 tokens, " in found.err and "tokens/s" in found.err and "There is no /nothing" in found.err


class Scripted:
    """A talk that gets Ctrl-C in the middle of its first answer."""

    def __init__(self) -> None:
        self.turn, self.said = Turn(), []

    def say(self, text: str, going: Callable[[], bool]) -> Iterator[str]:
        self.said.append(text)
        yield "begun"
        if text == "one":
            os.kill(os.getpid(), signal.SIGINT)
            while going():
                pass
            self.turn = Turn(new_tokens=1, answer_s=0.1, finish="interrupted")
            return
        self.turn = Turn(new_tokens=1, answer_s=0.1, finish="eos")
        yield " and ended"

    def close(self) -> None:
        self.said.append("closed")


def test_ctrl_c_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    scripted: Any = Scripted()
    before = signal.getsignal(signal.SIGINT)
    converse(scripted)
    assert signal.getsignal(signal.SIGINT) is before
    found = capsys.readouterr()
    assert scripted.said == ["one", "two", "closed"]
    assert found.out == "begun\nbegun and ended\n" and "(stopped)" in found.err


@pytest.mark.slow
def test_ctrl_c_on_the_real_model(smollm2_path: Path) -> None:
    del smollm2_path  # skips where the model is not installed
    command = [sys.executable, "-m", "trimtab.cli.main", "chat", "smollm2-135m", "--gen", "4000", "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"Count from one to a thousand in words.\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"Say yes.\n/exit\n")
        process.stdin.close()
        rest, told = process.stdout.read(), process.stderr.read().decode()
        assert process.wait(60) == 0 and rest.endswith(b"\n")
    assert "(stopped)" in told and "2 answers" in told
