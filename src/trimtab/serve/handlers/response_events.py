"""The events of a streamed response."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import msgspec

from trimtab.serve.call import Call
from trimtab.serve.handlers.chat import ChoiceState
from trimtab.serve.sse import named
from trimtab.serve.types.common import Logprob
from trimtab.serve.types.responses import OutputCall, OutputMessage, OutputText, Response, ResponseEvent


class EventWriter:
    """Numbers events and knows which output item is open.

    Attributes:
        output: items that are whole.
    """

    def __init__(self, response: Response) -> None:
        self._response = response
        self._numbers = itertools.count()
        self.output: list[OutputMessage | OutputCall] = []
        self._message = ""  # id of the message that is open
        self._text: list[str] = []
        self._logprobs: list[Logprob] = []

    def next(self) -> int:
        """The number of the next event."""
        return next(self._numbers)

    def event(self, name: str, /, **fields: Any) -> bytes:
        """One event."""
        return named(name, ResponseEvent(type=name, sequence_number=self.next(), **fields))

    def lifecycle(self, name: str, response: Response) -> bytes:
        """An event about the whole response."""
        return self.event(name, response=response)

    def text(self, call: Call, delta: str, logprobs: list[Logprob]) -> bytes:
        """Text; opens a message if none is open."""
        out, place = b"", len(self.output)
        if not self._message:
            self._message = call.new_id("msg")
            item = OutputMessage(id=self._message, content=[], status="in_progress")
            out += self.event("response.output_item.added", output_index=place, item=item)
            out += self.event(
                "response.content_part.added",
                item_id=self._message,
                output_index=place,
                content_index=0,
                part=OutputText(text=""),
            )
        self._text.append(delta)
        self._logprobs += logprobs
        return out + self.event(
            "response.output_text.delta",
            item_id=self._message,
            output_index=place,
            content_index=0,
            delta=delta,
            logprobs=logprobs,
        )

    def call(self, made: OutputCall) -> bytes:
        """A function call; closes a message before it."""
        out = self._close_message("completed")
        place = len(self.output)
        self.output.append(made)
        begun = msgspec.structs.replace(made, arguments="", status="in_progress")
        ids = {"item_id": made.id, "output_index": place}
        return (
            out
            + self.event("response.output_item.added", output_index=place, item=begun)
            + self.event("response.function_call_arguments.delta", delta=made.arguments, **ids)
            + self.event("response.function_call_arguments.done", arguments=made.arguments, name=made.name, **ids)
            + self.event("response.output_item.done", output_index=place, item=made)
        )

    def close(self, state: ChoiceState, call: Call) -> bytes:
        """The end of the last message; an answer without text or call is one empty message."""
        out = b"" if self._message or self.output else self.text(call, "", [])
        return out + self._close_message("incomplete" if state.finish == "length" else "completed")

    def _close_message(self, status: Literal["completed", "incomplete"]) -> bytes:
        if not self._message:
            return b""
        place, text = len(self.output), "".join(self._text)
        part = OutputText(text=text, logprobs=self._logprobs)
        item = OutputMessage(id=self._message, content=[part], status=status)
        ids = {"item_id": self._message, "output_index": place, "content_index": 0}
        out = (
            self.event("response.output_text.done", text=text, logprobs=self._logprobs, **ids)
            + self.event("response.content_part.done", part=part, **ids)
            + self.event("response.output_item.done", output_index=place, item=item)
        )
        self.output.append(item)
        self._message, self._text, self._logprobs = "", [], []
        return out
