"""Chat templates: Jinja2 programs that come with a model and turn messages into its prompt format.

A template is somebody else's program, so it runs in Jinja2's immutable sandbox and sees plain JSON data only. What it
can call (`raise_exception`, `strftime_now`, `tojson`, `{% break %}`, `{% generation %}`) is what transformers offers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from trimtab.errors import SpecError

if TYPE_CHECKING:
    from jinja2 import Template


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """Render `messages` with a model's chat template.

    Args:
        template: Jinja2 source.
        messages: each with `role` and `content`; keys whose value is None are left out, as templates expect.
        add_generation_prompt: end with the header of the answer to come.
        variables: what else the template may ask for: `tools`, `documents`, `bos_token`, `enable_thinking`, ...

    Raises:
        SpecError: messages of another form, or a template that does not parse, refuses the messages or tries to leave
            the sandbox.
    """
    import jinja2
    from jinja2.exceptions import SecurityError

    if isinstance(messages, str | Mapping) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages
    ):
        raise SpecError(
            'Chat messages must be a list such as [{"role": "user", "content": "Hello"}], each with a role.'
        )
    chat = [_message(_plain(message)) for message in messages]
    known: dict[str, Any] = {"tools": None, "documents": None} | {
        name: _plain(value) for name, value in variables.items()
    }
    try:
        return _compile(template).render(messages=chat, add_generation_prompt=add_generation_prompt, **known)
    except SecurityError as error:
        raise SpecError(
            f"The chat template tried to leave its sandbox and was stopped: {error}. "
            "Do not trust this model's files; pass a template of your own."
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(f"The chat template does not parse: {error.message} (line {error.lineno}).") from None
    except jinja2.TemplateError as error:
        raise SpecError(f"The chat template refused these messages: {error.message}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        raise SpecError(f"The chat template failed on these messages: {type(error).__name__}: {error}") from None


#: Keys under which programs pass what a model thought; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _message(message: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if value is not None}
    thought = next((found[key] for key in _REASONING if key in found), None)
    return found if thought is None else {"thinking": thought, **found, "reasoning_content": thought}


def _plain(value: Any) -> Any:
    """Rebuild a value out of JSON types, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # Subclasses, enums among them, are stripped to their base.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return f"<{type(value).__name__}>"


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    import jinja2
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}`` marks the assistant's text for training; here its body passes."""

        tags = {"generation"}  # noqa: RUF012 - the name and form are Jinja2's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Jinja2's namespace, without underscore names, which would reach Python's internals."""

        def __init__(self, /, *args: Any, **attributes: Any) -> None:
            for name in dict(*args, **attributes):
                _refuse_underscore(name)
            super().__init__(*args, **attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            super().__setitem__(name, value)

    def _refuse_underscore(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja2's own filter escapes HTML characters, which models were not trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja2's sandbox, which answers a forbidden attribute with nothing; here it is an error at once."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=Namespace)
    return environment.from_string(template)
