"""One measurement at a time, in a process of its own, so that it can be watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence

import msgspec

from trimtab.serve.errors import ApiError
from trimtab.ui.explorer.desk import Desk, measurable
from trimtab.ui.explorer.types import Case, Progress

#: Characters of a failed measurement's last words that are kept.
_LAST_WORDS = 2000

#: Seconds that the end of a killed measurement may take.
_LATE_S = 5.0


class Step(msgspec.Struct):
    """A line the measuring process writes: `done` of `total` steps of what `label` names."""

    label: str
    done: int
    total: int


class Measuring:
    """The measurement of a server.

    Args:
        command: what runs it: reads a case on standard input, writes `Step` lines.
    """

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "trimtab.ui.explorer.child")) -> None:
        self._command = tuple(command)
        self._state = Progress(state="idle")
        self._began = 0.0
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    def progress(self) -> Progress:
        """How far it is."""
        if self._state.state == "running":
            self._state.elapsed_s = time.monotonic() - self._began
        return self._state

    async def start(self, desk: Desk, case: Case) -> Progress:
        """Begin.

        Raises:
            ApiError: 400, the case cannot run here; 409, another one runs.
        """
        if self._state.state == "running":
            raise ApiError(409, "A measurement is running. Wait for it, or cancel it first.", code="measuring")
        priced = await asyncio.to_thread(desk.price, case)
        if refused := measurable(priced):
            raise ApiError(400, refused, param="model", code="not_measurable")
        command = priced.plan.command("measure")
        self._state = Progress(state="running", command=command, label="starting")
        self._began = time.monotonic()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )  # fmt: skip
        except OSError as error:
            self._state = Progress(state="failed", command=command, error=f"{error.strerror}: {self._command[0]}")
            return self._state
        self._watch = asyncio.create_task(self._follow(self._process, case))
        return self._state

    async def cancel(self) -> Progress:
        """End it; what it had not finished stays in the ledger as interrupted."""
        if self._state.state == "running" and self._process is not None:
            self._state.state = "cancelled"
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            if self._watch is not None:  # it is dead; its last words may be late, and nobody waits long for them
                await asyncio.wait([self._watch], timeout=_LATE_S)
        return self._state

    async def _follow(self, process: asyncio.subprocess.Process, case: Case) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(case))
            process.stdin.close()
        state = self._state
        async for line in process.stdout:
            with contextlib.suppress(msgspec.DecodeError):
                step = msgspec.json.decode(line, type=Step)
                state.label, state.done, state.total = step.label, step.done, step.total
        code = await process.wait()
        said = (await errors).decode("utf-8", "replace").strip()
        state.elapsed_s = time.monotonic() - self._began
        if state.state == "running":
            state.state = "failed" if code else "done"
            state.error = (said[-_LAST_WORDS:] or f"The measurement ended with exit code {code}.") if code else ""
