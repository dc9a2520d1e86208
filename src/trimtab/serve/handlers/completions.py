"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import UNSET

from trimtab.serve.call import Call
from trimtab.serve.errors import bad
from trimtab.serve.front import Answer, Events, Front, Json
from trimtab.serve.generation import Generation, check_prompts, compile_for, encode_texts, submit_for
from trimtab.serve.handlers.chat import fingerprint, finish_reason
from trimtab.serve.messages import ModelInfo, Piece, TokenLogprob
from trimtab.serve.sampling import requested_grammar, sampling
from trimtab.serve.sse import data, done, error_data
from trimtab.serve.texts import TokenTexts
from trimtab.serve.types.completions import CompletionChoice, CompletionLogprobs, CompletionReply, CompletionRequest

#: Most answers of one request: prompts times choices drawn.
MAX_ANSWERS = 256


async def completions(front: Front, call: Call, request: CompletionRequest) -> Answer:
    """Continue texts.

    Raises:
        ApiError: any refusal.
    """
    model = front.model(call, request.model)
    n = request.n or 1
    best_of = n if request.best_of is None else request.best_of
    if best_of < n:
        raise bad(f"'best_of' is {best_of}, fewer than n={n}. Raise it to {n} or more, or leave it out.", "best_of")
    if request.stream and best_of > n:
        raise bad("'best_of' cannot be streamed: the best is known at the end. Leave out stream or best_of.", "best_of")
    if request.stream_options is not None and not request.stream:
        raise bad("'stream_options' needs stream. Set stream to true, or leave it out.", "stream_options")
    grammar = requested_grammar(request)
    await compile_for(grammar, "response_format")
    texts = await front.texts(model.base)
    prompts = await encode_texts(texts, request.prompt, model, "prompt")
    if len(prompts) * best_of > MAX_ANSWERS:
        raise bad(
            f"{len(prompts)} prompts with {best_of} answers each are more than {MAX_ANSWERS}. Send fewer.", "prompt"
        )
    check_prompts(front, prompts, "prompt")
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and not request.echo:
        raise bad("'max_tokens' is 0. Allowed: 1 or more, or 0 together with echo.", "max_tokens")
    drawn = sampling(
        request, prompt_tokens=max(map(len, prompts)), model=model, max_tokens=max_tokens,
        logprobs=request.logprobs, prompt_field="prompt",
    )  # fmt: skip
    drawn = msgspec.structs.replace(
        drawn, best_of=best_of,
        # an answer of no tokens is a scoring of the prompt
        prompt_logprobs=(request.logprobs or 0) if request.echo and (request.logprobs is not None or max_tokens == 0) else None,
    )  # fmt: skip
    name = call.new_id("cmpl")
    submits = [
        submit_for(
            front, call, model, name if len(prompts) == 1 else f"{name}-{place}", prompt, drawn, grammar, request
        )
        for place, prompt in enumerate(prompts)
    ]
    generation = Generation(front, call, model, name, submits, n)
    make = _Maker(request, name, model, texts, prompts, n)
    if request.stream:
        return Events(_stream(generation, make), error_data)
    with generation:
        async with aclosing(generation.events()) as events:
            async for index, piece in events:
                if piece is not None:
                    make.states[index].add(piece)
        choices = [make.choice(index, generation.prompt_logprobs(index // n)) for index in range(len(make.states))]
        return Json(msgspec.structs.replace(make.base, choices=choices, usage=generation.usage()))


@dataclass(slots=True)
class _State:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    shown: int = 0  # characters of the answer that log-probabilities were sent for

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.logprobs += piece.logprobs
        self.finish = finish_reason(piece.finish) if piece.finish else self.finish


class _Maker:
    """Turns pieces into choices of an answer."""

    def __init__(
        self,
        request: CompletionRequest,
        name: str,
        model: ModelInfo,
        texts: TokenTexts,
        prompts: Sequence[Sequence[int]],
        n: int,
    ) -> None:
        self.request, self.texts, self.prompts, self.n = request, texts, prompts, n
        self.states = [_State() for _ in range(len(prompts) * n)]
        self.base = CompletionReply(
            id=name, created=int(time.time()), model=request.model, choices=[], system_fingerprint=fingerprint(model)
        )

    def prompt_text(self, index: int) -> str:
        """Of the prompt that choice `index` continues."""
        asked = self.request.prompt
        if isinstance(asked, str):
            return asked
        row = asked[index // self.n]
        return row if isinstance(row, str) else self.texts.tokenizer.decode(self.prompts[index // self.n])

    def choice(self, index: int, prompt_logprobs: Sequence[TokenLogprob]) -> CompletionChoice:
        """A whole answer."""
        state, echo = self.states[index], bool(self.request.echo)
        before = self.prompt_text(index) if echo else ""
        logprobs = None
        if self.request.logprobs is not None:
            prompt = self.prompts[index // self.n] if echo else ()
            logprobs = self.logprobs([*self._echoed(prompt, prompt_logprobs), *state.logprobs])
        return CompletionChoice(
            index=index, text=before + "".join(state.text), finish_reason=state.finish or "length", logprobs=logprobs
        )

    def _echoed(self, prompt: Sequence[int], found: Sequence[TokenLogprob]) -> list[TokenLogprob | int]:
        """The prompt's tokens; the first has no probability."""
        return [*prompt[:1], *found] if found else list(prompt)

    def logprobs(self, entries: Sequence[TokenLogprob | int], offset: int = 0) -> CompletionLogprobs:
        """The columns OpenAI uses; a bare id has no probability."""
        out = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self.request.logprobs else None, text_offset=[]
        )
        for entry in entries:
            index = entry if isinstance(entry, int) else entry.id
            text = self.texts.token(index)[0]
            out.tokens.append(text)
            out.text_offset.append(offset)
            offset += len(text)
            made = None if isinstance(entry, int) else self.texts.logprob(entry)
            out.token_logprobs.append(made.logprob if made else None)
            if out.top_logprobs is not None:
                out.top_logprobs.append({top.token: top.logprob for top in made.top_logprobs} if made else None)
        return out


async def _stream(generation: Generation, make: _Maker) -> AsyncGenerator[bytes, None]:
    request, options = make.request, make.request.stream_options
    always = bool(options and options.continuous_usage_stats)
    wanted = always or bool(options and options.include_usage)
    base = msgspec.structs.replace(make.base, usage=None if wanted else UNSET)

    def chunk(choice: CompletionChoice) -> bytes:
        return data(msgspec.structs.replace(base, choices=[choice], usage=generation.usage() if always else base.usage))

    echoed = not request.echo
    with generation:
        async with aclosing(generation.events()) as events:
            async for index, piece in events:
                if not echoed:
                    # Log-probabilities of the prompt are known at its end only, so a stream echoes text alone.
                    echoed = True
                    for place in range(len(make.states)):
                        yield chunk(CompletionChoice(index=place, text=make.prompt_text(place), finish_reason=None))
                if piece is None:
                    continue
                state = make.states[index]
                logprobs = None
                if request.logprobs is not None and piece.logprobs:
                    logprobs = make.logprobs(piece.logprobs, state.shown)
                    state.shown += sum(map(len, logprobs.tokens))
                ended = piece.finish in ("stop", "length")
                if piece.text or logprobs or ended:
                    reason = finish_reason(piece.finish) if ended and piece.finish else None
                    yield chunk(CompletionChoice(index=index, text=piece.text, finish_reason=reason, logprobs=logprobs))
        if wanted:
            yield data(msgspec.structs.replace(base, choices=[], usage=generation.usage()))
    yield done()
