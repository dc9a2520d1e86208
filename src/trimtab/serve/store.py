"""Responses that `previous_response_id` may name: the newest, in bounded memory, each seen by its own key only."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import msgspec

from trimtab.serve.types.chat import Message
from trimtab.serve.types.responses import Response


class Stored(NamedTuple):
    """A response and the conversation up to its end, instructions left out."""

    response: Response
    messages: tuple[Message, ...]
    size: int


class ResponseStore:
    """The newest responses.

    Args:
        entries, size: at most so many, and so many bytes together.
    """

    def __init__(self, entries: int = 1024, size: int = 32 << 20) -> None:
        self._entries, self._limit, self._size = entries, size, 0
        self._found: OrderedDict[tuple[str, str], Stored] = OrderedDict()

    def put(self, tenant: str, response: Response, messages: tuple[Message, ...]) -> None:
        """Keep a response; the oldest make room."""
        size = len(msgspec.json.encode(response)) + len(msgspec.json.encode(messages))
        if size > self._limit:
            return
        self._found[tenant, response.id] = Stored(response, messages, size)
        self._size += size
        while len(self._found) > self._entries or self._size > self._limit:
            self._size -= self._found.popitem(last=False)[1].size

    def get(self, tenant: str, name: str) -> Stored | None:
        """A response of this tenant, if it is still there."""
        return self._found.get((tenant, name))

    def remove(self, tenant: str, name: str) -> bool:
        """Forget a response; False if it was not there."""
        found = self._found.pop((tenant, name), None)
        self._size -= found.size if found else 0
        return found is not None
