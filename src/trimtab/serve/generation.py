"""A generation from submission to its last event: limits, metrics, usage, cancellation."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from trimtab.serve.call import Call
from trimtab.serve.errors import ApiError
from trimtab.serve.front import Front
from trimtab.serve.messages import (
    Admitted,
    Embed,
    Embedded,
    Finished,
    Grammar,
    ModelInfo,
    Piece,
    Sampling,
    Submit,
    TokenLogprob,
)
from trimtab.serve.prompts import text_prompts
from trimtab.serve.sampling import compile_grammar, priority
from trimtab.serve.stream import deadline_error
from trimtab.serve.texts import TokenTexts
from trimtab.serve.types.common import PromptDetails, Usage

T = TypeVar("T")
#: Texts of more characters are encoded in a thread.
LONG_TEXT = 20_000


class Generation:
    """The engine's work for one HTTP request: a context manager that submits when entered and cancels what is left at the end.

    Args:
        front, call, model: whose.
        name: the id its client is told.
        requests: one for each prompt.
        choices: of each prompt.

    Attributes:
        finished: by prompt.
        vectors: of embeddings, by prompt.
        new_tokens: sent so far.

    Raises:
        ApiError: when entered: over a limit, or there is no engine.
    """

    def __init__(
        self,
        front: Front,
        call: Call,
        model: ModelInfo,
        name: str,
        requests: Sequence[Submit | Embed],
        choices: int = 1,
    ) -> None:
        self._front, self._call, self._model, self._name = front, call, model, name
        self._choices = choices
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.new_tokens = 0
        self.finished: dict[int, Finished] = {}
        self.vectors: dict[int, bytes] = {}
        self._cached: dict[int, int] = {}
        self._first = True
        self._last: dict[int, float] = {}
        self._predicted: Admitted | None = None
        self._requests = requests

    def __enter__(self) -> Generation:
        drawn = sum(
            request.sampling.max_tokens * max(request.sampling.best_of, request.sampling.n)
            for request in self._requests
            if isinstance(request, Submit)
        )
        self._lease = self._call.tenant.take(self.prompt_tokens + drawn)
        try:
            self._stream = self._front.engine.submit(self._requests)
        except BaseException:
            self._lease.end(0)
            raise
        metrics, label = self._front.metrics, self._model.id
        self._between = metrics.between.labels(label)
        self._call.written = metrics.delay.labels(label).observe
        self._front.open[self._name] = (self._call.tenant.entry.name, self.cancel)
        self._call.log |= {"id": self._name, "prompt_tokens": self.prompt_tokens}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A generator that is dropped, or a task that is cancelled: the client went.
        self._front.engine.close(self._stream, self._call.leaves)
        self._front.open.pop(self._name, None)
        self._lease.end(self.prompt_tokens + self.total_new)
        self._call.log |= {"completion_tokens": self.total_new, "cached_tokens": self.cached_tokens}
        metrics, label = self._front.metrics, self._model.id
        metrics.prompt.labels(label).inc(self.prompt_tokens)
        metrics.generated.labels(label).inc(self.total_new)
        if kind is None:
            self._observe_end()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(self._cached.values())

    @property
    def total_new(self) -> int:
        """New tokens, drawn but unsent ones included once they are known."""
        return max(self.new_tokens, sum(finished.completion_tokens for finished in self.finished.values()))

    def usage(self) -> Usage:
        """Tokens so far."""
        new = self.total_new
        return Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=new, total_tokens=self.prompt_tokens + new,
            prompt_tokens_details=PromptDetails(self.cached_tokens),
        )  # fmt: skip

    def prompt_logprobs(self, place: int) -> tuple[TokenLogprob, ...]:
        """Of one prompt, once it has finished."""
        return self.finished[place].prompt_logprobs if place in self.finished else ()

    def cancel(self) -> None:
        """Cancel on request: the client gets an error now."""
        self._stream.fail(ApiError(499, "The request was cancelled.", code="request_cancelled", retry=False), "request")

    async def events(self) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Yield (choice, piece), choices counted over all prompts; (-1, None) when the work has begun.

        Raises:
            ApiError: it did not come to its end.
        """
        ended: ApiError | None = None
        async with aclosing(self._stream.events()) as events:
            async for place, event, at_s in events:
                if isinstance(event, Admitted):
                    self._cached[place] = event.cached_tokens
                    self._predicted = self._predicted or event
                    self._front.metrics.queued.labels(self._model.id).observe(event.queued_s)
                    yield -1, None
                elif isinstance(event, Piece):
                    choice = place * self._choices + event.choice
                    self._observe(choice, event, at_s)
                    yield choice, event
                    if event.finish == "cancelled":
                        ended = ApiError(499, "The request was cancelled.", code="request_cancelled", retry=False)
                    elif event.finish == "deadline":
                        ended = deadline_error(self._front.config.request_s)
                elif isinstance(event, Finished):
                    self.finished[place] = event
                    self._cached[place] = event.cached_tokens
                elif isinstance(event, Embedded):
                    self.vectors[place] = event.vector
                    self._cached[place] = event.cached_tokens
        if ended is not None:
            raise ended

    def _observe(self, choice: int, piece: Piece, at_s: float) -> None:
        metrics, label = self._front.metrics, self._model.id
        count = len(piece.ids)
        self.new_tokens += count
        self._call.token_at = at_s if count else None
        if count:
            if self._first:
                self._first = False
                took = time.monotonic() - self._call.arrived
                metrics.first_token.labels(label).observe(took)
                self._call.log["first_token_seconds"] = round(took, 4)
                if self._predicted is not None and self._predicted.predicted_first_s is not None:
                    metrics.predicted.labels(label, "first_token").observe(self._predicted.predicted_first_s)
                    metrics.measured.labels(label, "first_token").observe(took)
            if choice in self._last:
                for _ in range(count):
                    self._between.observe((at_s - self._last[choice]) / count)
            self._last[choice] = at_s
        if piece.finish is not None:
            metrics.success.labels(label, piece.finish if piece.finish in ("stop", "length") else "abort").inc()
            self._call.log["finish"] = piece.finish

    def _observe_end(self) -> None:
        metrics, label, took = self._front.metrics, self._model.id, time.monotonic() - self._call.arrived
        metrics.whole.labels(label).observe(took)
        if self._predicted is not None and self._predicted.predicted_s is not None:
            metrics.predicted.labels(label, "request").observe(self._predicted.predicted_s)
            metrics.measured.labels(label, "request").observe(took)


def submit_for(
    front: Front,
    call: Call,
    model: ModelInfo,
    name: str,
    prompt: Sequence[int],
    sampling: Sampling,
    grammar: Grammar | None,
    request: object,
) -> Submit:
    """The engine's form of a request."""
    return Submit(
        id=name, model=model.id, prompt=tuple(prompt), sampling=sampling, grammar=grammar, salt=salt(call, request),
        priority=allowed_priority(call, request), deadline_s=front.config.request_s,
    )  # fmt: skip


def salt(call: Call, request: object) -> str:
    """Whose prefixes these are: the key, and within it `cache_salt` or `prompt_cache_key`.

    The time to the first token tells whether a prefix was cached, so only requests that may know of each other share.
    """
    group = getattr(request, "cache_salt", None) or getattr(request, "prompt_cache_key", None) or ""
    return hashlib.sha256(f"{call.tenant.entry.name}\0{group}".encode()).hexdigest()[:32]


def allowed_priority(call: Call, request: object) -> int:
    """What was asked for, but not before what the key allows."""
    return max(priority(request), call.tenant.entry.priority)


def check_prompts(front: Front, prompts: Sequence[Sequence[int]], field: str) -> None:
    """Refuse prompts beyond the server's own limit.

    Raises:
        ApiError: 400.
    """
    limit, longest = front.config.max_prompt_tokens, max(map(len, prompts))
    if limit and longest > limit:
        raise ApiError(
            400,
            f"The prompt has {longest} tokens; this server takes at most {limit}. Shorten it.",
            param=field,
            code="context_length_exceeded",
        )


async def in_thread(length: int, work: Callable[[], T]) -> T:
    """Do what takes time in proportion to a text: long ones in a thread, so that other streams go on."""
    return work() if length < LONG_TEXT else await asyncio.to_thread(work)


async def encode_texts(texts: TokenTexts, asked: Any, model: ModelInfo, field: str) -> list[list[int]]:
    """Token ids of `prompt` or `input`; see `text_prompts`."""
    length = len(asked) if isinstance(asked, str) else sum(len(item) if isinstance(item, str) else 1 for item in asked)
    return await in_thread(length, lambda: text_prompts(texts.tokenizer, asked, model.vocab_size, field))


async def compile_for(grammar: Grammar | None, field: str) -> None:
    """Check a grammar in a thread: large ones take long.

    Raises:
        ApiError: as `compile_grammar`.
    """
    if grammar is not None:
        await asyncio.to_thread(compile_grammar, grammar, field)
