"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import SpecError
from trimtab.serve.messages import Start


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Settings of an HTTP process; times in seconds, sizes in bytes.

    Args:
        host, port: where to listen; port 0 takes a free one.
        api_key_file: see `trimtab.serve.keys`; None = no keys, which only a loopback host allows.
        allow_anonymous: listen beyond loopback without keys all the same.
        max_body: longest request body.
        max_headers: longest request line and headers.
        max_connections: open connections; more are closed at once.
        header_s, body_s, idle_s: longest time to send headers, to send a body, between requests.
        request_s: longest time of one request.
        slow_reader_s: how long a stream may stand still because its reader takes nothing.
        heartbeat_s: a comment is sent on a stream that has been silent so long.
        grace_s: how long open requests may go on after SIGTERM.

    Raises:
        SpecError: a value outside its range, or a host beyond loopback without keys.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_anonymous: bool = False
    max_body: int = 4 << 20
    max_headers: int = 32 << 10
    max_connections: int = 1024
    header_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 60.0
    request_s: float = 600.0
    slow_reader_s: float = 30.0
    heartbeat_s: float = 10.0
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name, least)
            if not value >= least:
                raise SpecError(f"--{_flag(name)} {value}: not possible. Allowed: {least} or more.")
        if self.port > 65535:
            raise SpecError(f"--port {self.port}: not possible. Allowed: 0..65535; 0 takes a free one.")
        if self.api_key_file is None and not self.allow_anonymous and not is_loopback(self.host):
            raise SpecError(
                f"--host {self.host} lets other machines in, and there are no API keys. Give --api-key-file FILE "
                "(trimtab serve --new-key NAME makes an entry), or --allow-anonymous if the network is trusted."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(HttpConfig):
    """All settings of a server of models; times in seconds, sizes in bytes.

    Args:
        models: ids to serve, ``base`` or ``base@spec+spec``; the first answers requests that name none.
        tokenizer: a folder or .gguf file; None = that of each base.
        max_queue, max_queue_tokens: requests and prompt tokens waiting, beyond which 429.
        max_queue_s: longest wait before 429.
        max_prompt_tokens: longest prompt; 0 = what the model takes.
        stream_buffer: bytes kept for one stream; from half of it on the engine pauses the request.
        engine_s: longest silence of the engine before it is killed and started again.
        start_s: longest time the engine may take to load.
        kv_bytes, threads, isa, dtype, kv_dtype, step_ms, answer_ms, step_tokens, max_sequences, prefix_cache, fairness, deterministic: see
            `trimtab.serve.messages.Start`.

    Raises:
        SpecError: as `HttpConfig`; no model, or one twice.
    """

    models: tuple[str, ...]
    tokenizer: Path | None = None
    max_queue: int = 256
    max_queue_tokens: int = 1 << 20
    max_queue_s: float = 60.0
    max_prompt_tokens: int = 0
    stream_buffer: int = 256 << 10
    engine_s: float = 60.0
    start_s: float = 600.0
    kv_bytes: int = 0
    threads: int = 0
    isa: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "float32"
    step_ms: float = 50.0
    answer_ms: float = 100.0
    step_tokens: int = 0
    max_sequences: int = 0
    prefix_cache: bool = True
    fairness: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise SpecError("No model to serve. Name one, for example: trimtab serve smollm2-135m.")
        if len(set(self.models)) != len(self.models):
            raise SpecError(f"A model is named twice: {', '.join(self.models)}. Name each once.")
        HttpConfig.__post_init__(self)

    def start(self) -> Start:
        """The engine's part."""
        same = {name: getattr(self, name) for name in Start.__struct_fields__ if name not in ("protocol", "tokenizer")}
        return Start(**same, tokenizer="" if self.tokenizer is None else str(self.tokenizer))


_LEAST: dict[str, float] = {
    "port": 0, "max_queue": 1, "max_queue_tokens": 1, "max_queue_s": 0.1, "max_prompt_tokens": 0, "max_body": 1024,
    "max_headers": 1024, "max_connections": 1, "header_s": 0.1, "body_s": 0.1, "idle_s": 0.1, "request_s": 0.1,
    "slow_reader_s": 0.1, "stream_buffer": 1024, "heartbeat_s": 0.1, "grace_s": 0, "engine_s": 1, "start_s": 1,
    "kv_bytes": 0, "threads": 0, "step_ms": 1, "answer_ms": 0, "step_tokens": 0, "max_sequences": 0,
}  # fmt: skip


def _flag(name: str) -> str:
    return "grace" if name == "grace_s" else (name[:-2] + "-seconds" if name.endswith("_s") else name).replace("_", "-")


def is_loopback(host: str) -> bool:
    """True if only this machine reaches `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_model_id(text: str) -> tuple[str, str]:
    """Cut ``base@spec+spec`` into the base and its techniques.

    >>> split_model_id("smollm2-135m@kivi:bits=4")
    ('smollm2-135m', 'kivi:bits=4')
    """
    base, _, techniques = text.partition("@")
    return base, techniques
