"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from trimtab.serve.types.common import Choices, ModelId, Reply, SamplingFields, TokenId, Top, Usage

#: A text, token ids, or several of either; mixtures are refused.
Prompts = (
    Annotated[str, Meta(min_length=1)]
    | Annotated[
        list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)
    ]
)  # fmt: skip


class CompletionRequest(SamplingFields, kw_only=True):
    """A text to continue."""

    model: ModelId
    prompt: Prompts
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: Top | None = None
    suffix: str | None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Of each token: its text, the log of its probability, the likeliest in its place, where it begins in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One of `n` continuations of one prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"] | None
    logprobs: CompletionLogprobs | None = None


class CompletionReply(Reply, kw_only=True):
    """A whole answer, or one event of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str | None = None
