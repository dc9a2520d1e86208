"""`POST /v1/responses`: text in, text or function calls out, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from trimtab.serve.call import Call
from trimtab.serve.decode import unsupported
from trimtab.serve.errors import ApiError, bad
from trimtab.serve.front import Answer, Events, Front, Json
from trimtab.serve.generation import Generation, check_prompts, compile_for, submit_for
from trimtab.serve.handlers.chat import ChoiceState, collect, encode_chat, states_of
from trimtab.serve.handlers.response_events import EventWriter
from trimtab.serve.messages import Grammar
from trimtab.serve.prompts import part_text
from trimtab.serve.sampling import json_grammar, sampling
from trimtab.serve.sse import named
from trimtab.serve.store import ResponseStore
from trimtab.serve.texts import TokenTexts
from trimtab.serve.tools import ToolSetup, tool_setup
from trimtab.serve.types.chat import ChatRequest, ContentPart, Message
from trimtab.serve.types.common import FunctionCall, FunctionDefinition, ToolCall, Usage
from trimtab.serve.types.responses import (
    Incomplete,
    InputDetails,
    InputItem,
    OutputCall,
    OutputMessage,
    OutputText,
    Response,
    ResponseError,
    ResponseEvent,
    ResponsesRequest,
    ResponsesUsage,
    TextConfig,
    TextFormat,
)
from trimtab.serve.types.server import Removed


async def responses(front: Front, call: Call, request: ResponsesRequest) -> Answer:
    """Answer input.

    Raises:
        ApiError: any refusal.
    """
    model = front.model(call, request.model)
    if request.truncation == "auto":
        raise unsupported("truncation", "Input is never cut silently; send disabled, and less input")
    said = _said_before(front.responses, call, request.previous_response_id) + messages_of(request.input)
    tools = tool_setup(_functions(request), request.tool_choice, request.parallel_tool_calls)
    grammar = _grammar(request.text.format if request.text else None)
    if grammar is not None and tools.functions:
        if tools.grammar is not None:
            raise bad("'text.format' and 'tool_choice' both say how to answer. Send one of them.", "text")
        tools = ToolSetup(tools.functions)
    await compile_for(grammar or tools.grammar, "text.format" if grammar else "tools")
    instructions = [Message(role="system", content=request.instructions)] if request.instructions else []
    chat = ChatRequest(
        model=request.model, messages=[*instructions, *said], temperature=request.temperature, top_p=request.top_p,
        priority=request.priority, service_tier=request.service_tier, cache_salt=request.cache_salt,
        prompt_cache_key=request.prompt_cache_key,
    )  # fmt: skip
    texts = await front.texts(model.base)
    prompt = await encode_chat(texts, chat, tools)
    check_prompts(front, [prompt], "input")
    logprobs = (request.top_logprobs or 0) if "message.output_text.logprobs" in (request.include or ()) else None
    drawn = sampling(
        chat, prompt_tokens=len(prompt), model=model, max_tokens=request.max_output_tokens, logprobs=logprobs,
        prompt_field="input", limit_field="max_output_tokens",
    )  # fmt: skip
    name = call.new_id("resp")
    submit = submit_for(front, call, model, name, prompt, drawn, grammar or tools.grammar, chat)
    generation = Generation(front, call, model, name, [submit])
    job = _Job(front, call, request, said, generation, _begun(name, request), states_of(1, tools)[0], texts)
    if request.stream:
        return Events(job.stream(), job.failed)
    with generation:
        await collect(generation, [job.state], texts)
    return Json(job.finished())


async def stored(front: Front, call: Call) -> Answer:
    """A response that is still kept."""
    found = front.responses.get(call.tenant.entry.name, call.path_params["id"])
    if found is None:
        raise _unknown(call.path_params["id"])
    return Json(found.response)


async def forget(front: Front, call: Call) -> Answer:
    """Remove a response."""
    if not front.responses.remove(call.tenant.entry.name, call.path_params["id"]):
        raise _unknown(call.path_params["id"])
    return Json(Removed(id=call.path_params["id"], object="response.deleted"))


def _unknown(name: str, param: str | None = None) -> ApiError:
    return ApiError(
        404, f"No response has the id '{name[:128]}'. It was not stored, or has made room for newer ones.", param=param,
        code="response_not_found",
    )  # fmt: skip


def _said_before(store: ResponseStore, call: Call, name: str | None) -> list[Message]:
    if name is None:
        return []
    found = store.get(call.tenant.entry.name, name)
    if found is None:
        raise _unknown(name, "previous_response_id")
    return list(found.messages)


def messages_of(asked: str | list[InputItem]) -> list[Message]:
    """Input as chat messages; calls that follow each other belong to one assistant's message.

    Raises:
        ApiError: 400: an item that is neither message nor function call nor its output.
    """
    if isinstance(asked, str):
        return [Message(role="user", content=asked)]
    found: list[Message] = []
    for place, item in enumerate(asked):
        field, kind = f"input[{place}]", item.type or "message"
        if kind == "message":
            if item.role is None or item.content is None:
                raise bad(f"'{field}' needs role and content.", field)
            content = item.content
            if not isinstance(content, str):
                content = "\n".join(
                    part_text(
                        ContentPart(type=part.type, text=part.text, refusal=part.refusal), f"{field}.content[{index}]"
                    )
                    for index, part in enumerate(content)
                )
            found.append(Message(role=item.role, content=content))
        elif kind == "function_call":
            if not item.call_id or not item.name or item.arguments is None:
                raise bad(f"'{field}' needs call_id, name and arguments.", field)
            made = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            if not (found and found[-1].role == "assistant" and found[-1].tool_calls):
                found.append(Message(role="assistant", tool_calls=[]))
            found[-1].tool_calls = [*(found[-1].tool_calls or ()), made]
        elif kind == "function_call_output":
            if not item.call_id or item.output is None:
                raise bad(f"'{field}' needs call_id and output.", field)
            output = item.output if isinstance(item.output, str) else "\n".join(part.text or "" for part in item.output)
            found.append(Message(role="tool", tool_call_id=item.call_id, content=output))
        elif kind != "reasoning":  # other programs send back what a model thought; there is nothing to do with it
            raise unsupported(
                f"{field}.type", f"It is {kind[:40]!r}; messages, function_call and function_call_output are understood"
            )
    if not found:
        raise bad("'input' holds no message. Send at least one.", "input")
    return found


def _functions(request: ResponsesRequest) -> list[FunctionDefinition]:
    found = []
    for place, tool in enumerate(request.tools or ()):
        if tool.type != "function":
            raise unsupported(f"tools[{place}].type", "Only functions are known")
        if tool.name is None:
            raise bad(f"'tools[{place}].name' is missing. A function needs it.", f"tools[{place}].name")
        found.append(
            FunctionDefinition(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            )
        )
    return found


def _grammar(asked: TextFormat | None) -> Grammar | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return json_grammar(None, "text.format")
    if asked.schema is None:
        raise bad("'text.format.schema' is missing. It is required for the type json_schema.", "text.format.schema")
    return json_grammar(asked.schema, "text.format.schema")


def _begun(name: str, request: ResponsesRequest) -> Response:
    plain = TextConfig(format=TextFormat(type="text"))
    return Response(
        id=name, created_at=float(int(time.time())), model=request.model, output=[], status="in_progress",
        tool_choice=request.tool_choice or "auto", tools=request.tools or [], text=request.text or plain,
        parallel_tool_calls=request.parallel_tool_calls is not False, instructions=request.instructions,
        max_output_tokens=request.max_output_tokens, metadata=request.metadata or {},
        previous_response_id=request.previous_response_id, top_logprobs=request.top_logprobs or 0,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p, user=request.user, store=request.store is not False,
        service_tier="default" if request.service_tier else None,
    )  # fmt: skip


def response_usage(usage: Usage) -> ResponsesUsage:
    """Usage in the words of this endpoint."""
    return ResponsesUsage(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
    )  # fmt: skip


class _Job:
    """One response on its way."""

    def __init__(
        self, front: Front, call: Call, request: ResponsesRequest, said: Sequence[Message], generation: Generation, response: Response,
        state: ChoiceState, texts: TokenTexts,
    ) -> None:  # fmt: skip
        self.front, self.call, self.request, self.said = front, call, request, said
        self.generation, self.response, self.state, self.texts = generation, response, state, texts
        self.writer = EventWriter(response)

    def finished(self, output: list[OutputMessage | OutputCall] | None = None) -> Response:
        """The whole response; kept for `previous_response_id` unless `store` is false."""
        state = self.state
        text = "".join(state.text)
        if output is None:
            output = []
            status = "incomplete" if state.finish == "length" else "completed"
            if text.strip() or not state.calls:
                parts = [OutputText(text=text, logprobs=state.logprobs)]
                output.append(OutputMessage(id=self.call.new_id("msg"), content=parts, status=status))
            output += [_output_call(self.call, made) for made in state.calls]
        cut = state.finish == "length"
        done = msgspec.structs.replace(
            self.response, output=output, status="incomplete" if cut else "completed", completed_at=float(int(time.time())),
            incomplete_details=Incomplete(reason="max_output_tokens") if cut else None, usage=response_usage(self.generation.usage()),
        )  # fmt: skip
        if done.store:
            answer = Message(role="assistant", content=text, tool_calls=state.calls or None)
            self.front.responses.put(self.call.tenant.entry.name, done, (*self.said, answer))
        return done

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Events in the order OpenAI's clients expect."""
        writer, begun = self.writer, False
        with self.generation:
            async with aclosing(self.generation.events()) as events:
                async for _, piece in events:
                    if not begun:
                        begun = True
                        yield writer.lifecycle("response.created", self.response)
                        yield writer.lifecycle("response.in_progress", self.response)
                    if piece is None:
                        continue
                    new, logprobs = self.state.add(piece, self.texts)
                    for item in new:
                        if isinstance(item, str):
                            yield writer.text(self.call, item, logprobs)
                            logprobs = []
                        else:
                            yield writer.call(_output_call(self.call, item))
            if closing := writer.close(self.state, self.call):
                yield closing
            done = self.finished(writer.output)
            yield writer.lifecycle(f"response.{done.status}", done)

    def failed(self, error: ApiError) -> bytes:
        """Events after an error."""
        broken = msgspec.structs.replace(
            self.response,
            status="failed",
            output=self.writer.output,
            error=ResponseError(code=error.code or "server_error", message=error.message),
        )
        event = ResponseEvent(
            type="error",
            sequence_number=self.writer.next(),
            code=error.code or "server_error",
            message=error.message,
            param=error.param,
        )
        return self.writer.lifecycle("response.failed", broken) + named("error", event)


def _output_call(call: Call, made: ToolCall) -> OutputCall:
    return OutputCall(
        id=call.new_id("fc"), call_id=made.id, name=made.function.name, arguments=made.function.arguments, status="completed"
    )  # fmt: skip
