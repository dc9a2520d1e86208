"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import UNSET

from trimtab.serve.call import Call
from trimtab.serve.decode import unsupported
from trimtab.serve.errors import bad
from trimtab.serve.front import Answer as HttpAnswer
from trimtab.serve.front import Events, Front, Json
from trimtab.serve.generation import LONG_TEXT, Generation, check_prompts, compile_for, in_thread, submit_for
from trimtab.serve.messages import ModelInfo, Piece, Submit
from trimtab.serve.prompts import chat_prompt
from trimtab.serve.sampling import requested_grammar, sampling
from trimtab.serve.sse import data, done, error_data
from trimtab.serve.texts import TokenTexts
from trimtab.serve.tools import ToolParser, ToolSetup, tool_setup
from trimtab.serve.types.chat import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatReply,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FunctionDelta,
    ToolCallDelta,
)
from trimtab.serve.types.common import FunctionDefinition, Logprob, Tool, ToolCall


async def chat(front: Front, call: Call, request: ChatRequest) -> HttpAnswer:
    """Answer a conversation.

    Raises:
        ApiError: any refusal.
    """
    model = front.model(call, request.model)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("'top_logprobs' needs logprobs. Set logprobs to true, or leave both out.", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise bad("'stream_options' needs stream. Set stream to true, or leave it out.", "stream_options")
    tools = tool_setup(functions_of(request.tools), request.tool_choice, request.parallel_tool_calls)
    grammar = requested_grammar(request)
    if grammar is not None and tools.functions:
        if tools.grammar is not None:
            raise bad(
                "'response_format' and 'tool_choice' both say how to answer. Send one of them.", "response_format"
            )
        tools = ToolSetup(tools.functions)  # a schema leaves no room for calls
    await compile_for(grammar or tools.grammar, "response_format" if grammar else "tools")
    texts = await front.texts(model.base)
    prompt = await encode_chat(texts, request, tools)
    check_prompts(front, [prompt], "messages")
    drawn = sampling(
        request, prompt_tokens=len(prompt), model=model, logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        max_tokens=positive(request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens),
    )  # fmt: skip
    name = call.new_id("chatcmpl")
    submit = submit_for(front, call, model, name, prompt, drawn, grammar or tools.grammar, request)
    generation = Generation(front, call, model, name, [submit], drawn.n)
    if request.stream:
        return Events(_stream(generation, request, submit, model, texts, tools), error_data)
    return Json(await _whole(generation, request, submit, model, texts, tools))


def functions_of(tools: list[Tool] | None) -> list[FunctionDefinition]:
    """The functions of `tools`.

    Raises:
        ApiError: 400: another kind of tool.
    """
    found = []
    for place, tool in enumerate(tools or ()):
        if tool.type != "function":
            raise unsupported(f"tools[{place}].type", "Only functions are known")
        if tool.function is None:
            raise bad(
                f"'tools[{place}].function' is missing. A tool of type function needs it.", f"tools[{place}].function"
            )
        found.append(tool.function)
    return found


def positive(max_tokens: int | None) -> int | None:
    """Refuse an answer of no tokens.

    Raises:
        ApiError: 400.
    """
    if max_tokens == 0:
        raise bad("'max_tokens' is 0. Allowed: 1 or more.", "max_tokens")
    return max_tokens


async def encode_chat(texts: TokenTexts, request: ChatRequest, tools: ToolSetup) -> list[int]:
    """Token ids of a conversation; in a thread if it is long."""
    template, asked = request.chat_template_kwargs, request.add_generation_prompt is not False

    def encode() -> list[int]:
        return chat_prompt(texts.tokenizer, request.messages, tools.functions, template, add_generation_prompt=asked)

    sizes = (
        len(message.content) if isinstance(message.content, str) else LONG_TEXT
        for message in request.messages
        if message.content
    )
    found = await in_thread(sum(sizes), encode)
    if not found:
        raise bad("The messages make an empty prompt. Send at least one character.", "messages")
    return found


Finish = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class ChoiceState:
    """One answer as it grows.

    Attributes:
        parser: finds tool calls; None = all is text.
        text, calls, logprobs: so far.
        finish: OpenAI's word, once it has ended.
    """

    parser: ToolParser | None
    text: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece, texts: TokenTexts) -> tuple[list[str | ToolCall], list[Logprob]]:
        """Take a piece; return the texts and calls, and the log-probabilities, that are new."""
        new: list[str | ToolCall] = [piece.text] if piece.text else []
        if self.parser is not None:
            new = self.parser.push(piece.text) if piece.text else []
            if piece.finish is not None:
                new += self.parser.finish()
        for item in new:
            if isinstance(item, str):
                self.text.append(item)
            else:
                self.calls.append(item)
        logprobs = texts.logprobs(piece.logprobs)
        self.logprobs += logprobs
        if piece.finish is not None:
            self.finish = "tool_calls" if self.calls and piece.finish == "stop" else finish_reason(piece.finish)
        return new, logprobs


def finish_reason(finish: str) -> Literal["stop", "length"]:
    """OpenAI's word for how a choice ended."""
    return "stop" if finish == "stop" else "length"


async def collect(generation: Generation, states: list[ChoiceState], texts: TokenTexts) -> None:
    """Run a generation to its end."""
    async with aclosing(generation.events()) as events:
        async for index, piece in events:
            if piece is not None:
                states[index].add(piece, texts)


def states_of(count: int, tools: ToolSetup) -> list[ChoiceState]:
    """A state for each choice."""
    return [ChoiceState(ToolParser() if tools.parse else None) for _ in range(count)]


async def _whole(
    generation: Generation, request: ChatRequest, submit: Submit, model: ModelInfo, texts: TokenTexts, tools: ToolSetup
) -> ChatReply:
    states = states_of(submit.sampling.n, tools)
    with generation:
        await collect(generation, states, texts)
        usage = generation.usage()
    choices = []
    for index, state in enumerate(states):
        text = "".join(state.text)
        answer = Answer(content=None if state.calls and not text.strip() else text, tool_calls=state.calls or UNSET)
        logprobs = ChoiceLogprobs(state.logprobs) if request.logprobs else None
        choices.append(ChatChoice(index=index, message=answer, finish_reason=state.finish or "stop", logprobs=logprobs))
    return ChatReply(
        id=submit.id, created=int(time.time()), model=request.model, choices=choices, usage=usage,
        system_fingerprint=fingerprint(model), service_tier="default" if request.service_tier else None,
    )  # fmt: skip


def fingerprint(model: ModelInfo) -> str | None:
    """Changes when answers of the same seed may."""
    return f"fp_{model.spec_hash[:10]}" if model.spec_hash else None


async def _stream(
    generation: Generation, request: ChatRequest, submit: Submit, model: ModelInfo, texts: TokenTexts, tools: ToolSetup
) -> AsyncGenerator[bytes, None]:
    options = request.stream_options
    wanted = bool(options and (options.include_usage or options.continuous_usage_stats))
    always = bool(options and options.continuous_usage_stats)
    base = ChatChunk(
        id=submit.id, created=int(time.time()), model=request.model, choices=[], system_fingerprint=fingerprint(model),
        usage=None if wanted else UNSET,
    )  # fmt: skip

    def chunk(index: int, delta: Delta, finish: Finish | None = None, logprobs: list[Logprob] | None = None) -> bytes:
        choice = ChunkChoice(
            index=index, delta=delta, finish_reason=finish, logprobs=ChoiceLogprobs(logprobs) if logprobs else None
        )
        usage = generation.usage() if always else base.usage
        return data(msgspec.structs.replace(base, choices=[choice], usage=usage))

    states = states_of(submit.sampling.n, tools)
    begun = False
    with generation:
        async with aclosing(generation.events()) as events:
            async for index, piece in events:
                if not begun:
                    begun = True
                    for place in range(len(states)):
                        yield chunk(place, Delta(role="assistant", content=""))
                if piece is None:
                    continue
                state = states[index]
                calls = len(state.calls)
                new, logprobs = state.add(piece, texts)
                deltas: list[Delta] = []
                for item in new:
                    deltas += _deltas(item, calls)
                    calls += isinstance(item, ToolCall)
                if logprobs and not deltas:
                    deltas = [Delta(content="")]
                for place, delta in enumerate(deltas):
                    yield chunk(index, delta, None, logprobs if place == 0 else None)
                if piece.finish in ("stop", "length"):
                    yield chunk(index, Delta(), state.finish)
        if wanted:
            yield data(msgspec.structs.replace(base, choices=[], usage=generation.usage()))
    yield done()


def _deltas(item: str | ToolCall, index: int) -> list[Delta]:
    """Chunks of a text or a call: a call's name comes first, then its arguments, as OpenAI's clients expect."""
    if isinstance(item, str):
        return [Delta(content=item)]
    first = ToolCallDelta(
        index=index, id=item.id, type="function", function=FunctionDelta(name=item.function.name, arguments="")
    )
    rest = ToolCallDelta(index=index, function=FunctionDelta(arguments=item.function.arguments))
    return [Delta(tool_calls=[first]), Delta(tool_calls=[rest])]
