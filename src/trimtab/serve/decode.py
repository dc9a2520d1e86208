"""From a request body to a typed request: one clear sentence for whatever is wrong with it."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any, TypeVar

import msgspec

from trimtab.serve.errors import ApiError, bad

_log = logging.getLogger("trimtab.serve")
T = TypeVar("T")

#: Field -> why it is refused when it says anything.
UNSUPPORTED = {
    "audio": "Only text is understood and made",
    "background": "Responses are made while the client waits or streams; leave it out and use stream",
    "context_management": "Conversations are not compacted",
    "conversation": "Conversations are not kept; send the messages, or use previous_response_id",
    "function_call": "It was replaced; use tool_choice",
    "functions": "It was replaced; use tools",
    "image": "Only text is understood and made",
    "moderation": "There is no moderation model",
    "prompt": "Prompt templates are not kept; send instructions and input",
    "suffix": "Text is continued, not filled in",
    "web_search_options": "The server fetches nothing from the network",
}
_AT = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")


@functools.cache
def _decoder(kind: type) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def decode(body: bytes, kind: type[T]) -> T:
    """Read a request.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        request = _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad(
            f"The body is not JSON that can be read: {what}. Send one JSON object in UTF-8.", code="invalid_json"
        ) from None
    if _log.isEnabledFor(logging.DEBUG):
        _name_unknown(body, kind)
    for name in request.__struct_fields__:
        if (
            name in UNSUPPORTED
            and getattr(request, name) not in (None, False, "", [], {})
            and not _text_prompt(request, name)
        ):
            raise unsupported(name, UNSUPPORTED[name])
    modalities = getattr(request, "modalities", None)
    if modalities and modalities != ["text"]:
        raise unsupported("modalities", 'Only text is understood and made; leave it out or send ["text"]')
    return request


def unsupported(field: str, why: str) -> ApiError:
    """The refusal of a field that means something the server cannot do."""
    return bad(f"'{field}' is not supported. {why}.", param=field, code="unsupported_parameter")


def _text_prompt(request: Any, name: str) -> bool:
    """True for the `prompt` of endpoints where it is the text itself."""
    return name == "prompt" and "input" not in request.__struct_fields__


def _explained(message: str) -> ApiError:
    place = _AT.search(message)
    field = place.group(1) if place else ""
    what = _AT.sub("", message).replace("`", "")
    missing = re.match(r"Object missing required field (\S+)", what)
    if missing:
        name = f"{field}.{missing.group(1)}" if field else missing.group(1)
        return bad(
            f"'{name}' is missing. It is required; see /openapi.json.", param=name, code="missing_required_parameter"
        )
    named = f"'{field}' is not possible" if field else "The body is not possible"
    return bad(
        f"{named}: {what[:1].lower()}{what[1:]}. See /openapi.json for what is allowed.",
        param=field or None,
        code="invalid_value",
    )


def _name_unknown(body: bytes, kind: type) -> None:
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    if unknown := sorted(name for name in given if name not in known):
        _log.debug("ignored unknown fields of %s: %s", kind.__name__, ", ".join(unknown))
