"""The state of the HTTP process, and what handlers share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import msgspec

from trimtab.errors import did_you_mean
from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.call import Budget, Call
from trimtab.serve.client import Engine
from trimtab.serve.config import HttpConfig, ServeConfig
from trimtab.serve.errors import ApiError
from trimtab.serve.keys import Keys
from trimtab.serve.launch import Launcher
from trimtab.serve.messages import ModelInfo
from trimtab.serve.metrics import Metrics
from trimtab.serve.store import ResponseStore
from trimtab.serve.texts import TokenTexts

#: Longest bodies that may be read at the same time.
_BODIES = 32


@dataclass(slots=True)
class Json:
    """An answer in one piece."""

    value: msgspec.Struct
    status: int = 200


@dataclass(slots=True)
class Plain:
    """An answer that is not JSON."""

    body: bytes
    content_type: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Events:
    """A streamed answer.

    Attributes:
        parts: bytes of server-sent events; an ApiError before the first becomes a plain error answer.
        failed: turns a later error into the last event.
    """

    parts: AsyncGenerator[bytes, None]
    failed: Callable[[ApiError], bytes]


Answer = Json | Plain | Events


class HttpFront:
    """What every endpoint needs, whatever stands behind it.

    Args:
        config: settings.
        keys: who may call.
        metrics: counters of answers.
    """

    def __init__(self, config: HttpConfig, keys: Keys, metrics: Metrics) -> None:
        self.config, self.keys, self.metrics = config, keys, metrics
        self.bodies = Budget(_BODIES * config.max_body)
        self.calls = 0

    def check(self) -> None:
        """Refuse while no request can be taken; here nothing stands in the way."""


class Front(HttpFront):
    """Everything the handlers of the engine need.

    Args:
        config: settings.
        launcher: starts engines.
        keys: who may call.
        tokenizer: from a base model's name to its tokenizer.
    """

    def __init__(
        self, config: ServeConfig, launcher: Launcher, keys: Keys, tokenizer: Callable[[str], Tokenizer]
    ) -> None:
        self.engine = Engine(launcher, config)
        super().__init__(config, keys, Metrics(self.engine))
        self.config: ServeConfig = config
        self.responses = ResponseStore()
        self.created = int(time.time())
        self.draining = False
        self.on_drain: Callable[[], None] = lambda: None
        #: What can be cancelled by the id its client was told: (tenant name, how).
        self.open: dict[str, tuple[str, Callable[[], None]]] = {}
        self._load_tokenizer = tokenizer
        self._texts: dict[str, TokenTexts] = {}

    def check(self) -> None:
        """Refuse while no request can be taken.

        Raises:
            ApiError: 503.
        """
        if self.draining:
            raise ApiError(
                503, "The server is shutting down and takes no new requests.", code="server_draining",
                retry_after_s=self.config.grace_s + 1,
            )  # fmt: skip
        self.engine.check()

    def model(self, call: Call, name: str | None) -> ModelInfo:
        """The model a request names; None = the first.

        Raises:
            ApiError: 404, not served or not for this key; 503 while there is no engine.
        """
        self.check()
        known = {asked: info for asked, info in self.engine.models.items() if call.tenant.may_use(asked)}
        if name is None and known:
            name = next(iter(known))
        if name not in known:
            ids = sorted({info.id for info in known.values()})
            listed = ", ".join(ids[:24]) or "none for this key"
            raise ApiError(
                404, f"The model '{str(name)[:200]}' is not served here.{did_you_mean(str(name)[:200], ids)} Served: {listed}.",
                param="model", code="model_not_found",
            )  # fmt: skip
        call.log["model"] = known[name].id
        return known[name]

    async def texts(self, base: str) -> TokenTexts:
        """The tokenizer of a base model; reading one takes a while the first time."""
        if base not in self._texts:
            tokenizer = await asyncio.to_thread(self._load_tokenizer, base)
            self._texts.setdefault(base, TokenTexts(tokenizer))
        return self._texts[base]
