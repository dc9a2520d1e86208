"""From the command line to exit codes: start, self check, signals, drain, end. No process outlives this one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from trimtab.errors import SpecError
from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.app import build_app
from trimtab.serve.client import StartFailed
from trimtab.serve.config import ServeConfig, split_model_id
from trimtab.serve.front import Front
from trimtab.serve.http import HttpServer, listen
from trimtab.serve.keys import read_keys
from trimtab.serve.launch import Launcher, SubprocessLauncher
from trimtab.serve.messages import Ready
from trimtab.serve.routes import Route
from trimtab.serve.texts import tokenizer_source

_log = logging.getLogger("trimtab.serve")
#: Exit codes: 0 drained, 1 broke or stopped by a second signal, 2 could not start as asked.
BROKE, REFUSED = 1, 2


class Service:
    """A running server.

    Args:
        config: settings.
        launcher: starts engines; default: the real one.
        tokenizer: from a base model's name to its tokenizer; default: what `config` and the model say.
        routes: endpoints beside the server's own.

    Attributes:
        front: state and engine.
        port: where it listens, once it does.
    """

    def __init__(
        self,
        config: ServeConfig,
        launcher: Launcher | None = None,
        tokenizer: Callable[[str], Tokenizer] | None = None,
        routes: Sequence[Route] = (),
    ) -> None:
        self.config = config
        self.front = Front(
            config,
            launcher or SubprocessLauncher(),
            read_keys(config.api_key_file),
            tokenizer or tokenizer_source(config.tokenizer),
        )
        self.front.on_drain = self.drain
        self.port = 0
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0
        self.server = HttpServer(build_app(self.front, routes), config)

    async def run(self, started: Callable[[Ready], None] | None = None) -> None:
        """Serve until drained.

        Args:
            started: called when requests are taken.

        Raises:
            StartFailed: the engine could not load.
            SpecError: the address is taken, or a tokenizer is missing.
        """
        self._loop = asyncio.get_running_loop()
        sock = listen(self.config.host, self.config.port)
        self.port = sock.getsockname()[1]
        serving = asyncio.create_task(self.server.serve(sockets=[sock]))
        try:
            ready = await self.front.engine.start()
            for info in ready.models:
                await self.front.texts(info.base)
            gc.collect()
            gc.freeze()  # collections while streams run look at what requests have left, not at modules and tokenizers
            if started is not None:
                started(ready)
            await serving
            if self._draining is not None:
                await self._draining
        finally:
            gc.unfreeze()
            self.server.should_exit = True
            await self.front.engine.stop()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    def drain(self) -> None:
        """Take no new requests, let open ones finish, then end; a second call changes nothing."""
        if self._draining is None:
            self.front.draining = True
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        _log.info("draining: %d requests are open", self.front.engine.open)
        await self.front.engine.drain(self.config.grace_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self.front.calls:  # answers that are on their way out
                    await asyncio.sleep(0.01)
        self.server.should_exit = True

    def signalled(self, number: int) -> None:
        """The first signal drains, the second ends at once."""
        self._signals += 1
        if self._signals == 1:
            self.drain()
            return
        _log.error("a second signal: ending at once")
        self.front.engine.kill()
        logging.shutdown()
        os._exit(BROKE)


def serve(
    config: ServeConfig,
    launcher: Launcher | None = None,
    tokenizer: Callable[[str], Tokenizer] | None = None,
    routes: Sequence[Route] = (),
) -> int:
    """Serve until a signal or /admin/drain; return the exit code.

    Raises:
        SpecError: settings, keys or models that are not possible.
    """
    check_models(config)

    async def main() -> None:
        service = Service(config, launcher, tokenizer, routes)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.signalled, number)
        try:
            await service.run(
                lambda ready: print(announcement(ready, config, service.port), file=sys.stderr, flush=True)
            )
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # all that is left to do is to end

    try:
        with logging_to_stderr():
            asyncio.run(main())
    except StartFailed as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return error.code
    return 0


def check_models(config: ServeConfig) -> None:
    """Refuse a technique that does not exist before anything is loaded.

    Raises:
        SpecError: an unknown technique or parameter.
    """
    from trimtab.spec.strings import parse_composition
    from trimtab.techniques.registry import parse_technique

    for model in config.models:
        base, techniques = split_model_id(model)
        if not base or (not techniques and "@" in model):
            raise SpecError(
                f"'{model}' is no model id. Write MODEL or MODEL@technique+technique, for example smollm2-135m@kivi:bits=4."
            )
        for part in parse_composition(techniques) if techniques else ():
            parse_technique(part)


def announcement(ready: Ready, config: ServeConfig, port: int) -> str:
    """What is printed when requests are taken: address, models, where the memory goes."""
    memory, gib = ready.memory, 1 << 30
    host = f"[{config.host}]" if ":" in config.host else config.host
    lines = [
        f"Trimtab serves {', '.join(info.id for info in ready.models)} at http://{host}:{port}/v1 (loaded in {ready.load_s:.1f} s)",
        f"  weights {memory.weight_bytes / gib:.2f} GiB, cache {memory.kv_bytes / gib:.2f} GiB = {memory.kv_tokens} tokens of "
        f"{memory.kv_bytes_per_token} bytes, workspace {memory.workspace_bytes / gib:.2f} GiB",
        f"  at most {memory.max_sequences} requests in a step; {memory.full_contexts:.1f} of full context fit the cache",
    ]
    lines.append(
        "  keys: " + (str(config.api_key_file) if config.api_key_file else "none; only this machine is let in")
    )
    return "\n".join(lines)


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Events as text, the access log as bare JSON lines; both on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    levels = {logging.getLogger("trimtab.serve"): logging.INFO, logging.getLogger("uvicorn.error"): logging.WARNING}
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in levels]
    try:
        for logger, level in levels.items():
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(level)
        yield
    finally:  # whoever called keeps a log of their own
        for logger, logger.handlers, logger.propagate, level in before:
            logger.setLevel(level)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name.endswith(".access") else super().format(record)
