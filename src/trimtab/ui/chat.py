"""A conversation on standard input and output."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trimtab.errors import SpecError
from trimtab.runtime.engine.talk import Talk

_HELP = "/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


class _Interrupt:
    """Ctrl-C while an answer is made: the first asks to stop after this pass, a second ends the program.

    A pass is not broken off: the cache would hold half of it.
    """

    def __init__(self) -> None:
        self.asked = False

    def going(self) -> bool:
        """Whether nobody asked to stop."""
        return not self.asked

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take Ctrl-C; elsewhere than in the main thread nothing changes."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def converse(talk: Talk) -> None:
    """Read turns and write answers until the end of input."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # lines can be edited and called back

        print(_HELP, file=sys.stderr)
    interrupt = _Interrupt()
    answers = new = run = prompt = 0
    seconds = prompt_s = 0.0
    try:
        for text in _lines(terminal):
            if text == "/exit":
                break
            if text == "/reset":
                talk.reset()
                continue
            if text.startswith("/") and " " not in text and "/" not in text[1:]:
                print(f"There is no {text}. {_HELP}", file=sys.stderr)
                continue
            with interrupt.watching():
                try:
                    for piece in talk.say(text, interrupt.going):
                        sys.stdout.write(piece)
                        sys.stdout.flush()
                except SpecError as error:
                    print(f"trimtab: {error}", file=sys.stderr)
                    if not terminal:
                        raise
                    continue
            sys.stdout.write("\n")
            sys.stdout.flush()
            turn = talk.turn
            if turn.finish == "interrupted":
                print("(stopped)", file=sys.stderr)
            answers, new, seconds = answers + 1, new + turn.new_tokens, seconds + turn.answer_s
            run, prompt, prompt_s = run + turn.run_tokens, prompt + turn.prompt_tokens, prompt_s + turn.prompt_s
    finally:
        talk.close()
        if answers:
            speed = f", {new / seconds:.1f} tokens/s" if seconds else ""
            read = f"{run} of {prompt} prompt tokens run" + (f", {run / prompt_s:.0f} tokens/s" if prompt_s else "")
            print(f"{answers} answer{'s' * (answers > 1)}, {new} tokens{speed}; {read}", file=sys.stderr)


def _lines(terminal: bool) -> Iterator[str]:
    """Turns without blanks around them; empty ones are left out."""
    while True:
        try:
            text = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(f"\n{_HELP}", file=sys.stderr)
            continue
        if not terminal and not text:
            return
        if text.strip():
            yield text.strip()
