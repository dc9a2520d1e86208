"""From the fields of a request to what the engine is told about drawing tokens."""

from __future__ import annotations

import msgspec

from trimtab.serve.errors import ApiError, bad
from trimtab.serve.messages import Grammar, ModelInfo, Sampling
from trimtab.serve.types.common import SamplingFields, StructuredOutputs

#: Longest grammar or schema in bytes; compiling takes time that grows with it.
MAX_GRAMMAR = 256 << 10
_TIERS = {"flex": 10, "priority": -10, "fast": -10}


def sampling(
    request: SamplingFields,
    *,
    prompt_tokens: int,
    model: ModelInfo,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_field: str = "messages",
    limit_field: str = "max_tokens",
) -> Sampling:
    """Check what goes together and fill in defaults.

    Args:
        request: the fields.
        prompt_tokens: of the longest prompt.
        model: whose context and vocabulary bound the request.
        max_tokens: asked for; None = what the context leaves.
        logprobs: as in `Sampling`.
        prompt_field, limit_field: what the request calls its text and `max_tokens`, for messages.

    Raises:
        ApiError: 400, naming the field.
    """
    room = model.context - prompt_tokens
    wanted = room if max_tokens is None else max_tokens
    if room < (1 if max_tokens != 0 else 0) or wanted > room:
        asked = "" if max_tokens is None else f" and {max_tokens} new ones"
        raise ApiError(
            400,
            f"The prompt has {prompt_tokens} tokens{asked}; the context of {model.id} is {model.context}. "
            f"Shorten the prompt{f' or ask for at most {room} new tokens' if room > 0 else ''}.",
            param=limit_field if 0 < room < wanted else prompt_field, code="context_length_exceeded",
        )  # fmt: skip
    least = request.min_tokens or 0
    if least > wanted:
        raise bad(
            f"'min_tokens' is {least}, more than the {wanted} tokens allowed. Lower it or raise max_tokens.",
            "min_tokens",
        )
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if not all(stop):
        raise bad("'stop' holds an empty text. Each stop text needs at least one character.", "stop")
    return Sampling(
        max_tokens=wanted,
        min_tokens=least,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),  # -1 is how vLLM's clients write "all"
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_bias(request.logit_bias, model),
        seed=None if request.seed is None else request.seed & (2**63 - 1),
        stop=tuple(dict.fromkeys(stop)),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        n=request.n or 1,
        best_of=request.n or 1,
        logprobs=logprobs,
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def _bias(asked: dict[str, float] | None, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    found = []
    for name, value in (asked or {}).items():
        if not name.isdecimal() or len(name) > 10 or int(name) >= model.vocab_size:
            raise bad(
                f"'logit_bias' names the token {name[:40]!r}. Allowed: token ids of {model.id}, 0..{model.vocab_size - 1}, as text.",
                "logit_bias",
            )
        found.append((int(name), value))
    return tuple(found)


def priority(request: object) -> int:
    """Priority of a request: `priority`, or what `service_tier` stands for."""
    asked = getattr(request, "priority", None)
    return asked if asked is not None else _TIERS.get(getattr(request, "service_tier", None) or "", 0)


def json_grammar(schema: dict | str | None, field: str) -> Grammar:
    """A grammar for a JSON schema; None = any object."""
    text = (
        schema
        if isinstance(schema, str)
        else msgspec.json.encode({"type": "object"} if schema is None else schema).decode()
    )
    return checked(Grammar("json_schema", text), field)


def requested_grammar(request: SamplingFields) -> Grammar | None:
    """The grammar of `response_format` or `structured_outputs`; not yet compiled.

    Raises:
        ApiError: 400: both, a format without its schema, or not exactly one kind.
    """
    wanted, outputs = request.response_format, request.structured_outputs
    if wanted is not None and wanted.type != "text":
        if outputs is not None:
            raise bad(
                "'structured_outputs' and 'response_format' both say how to answer. Send one of them.",
                "structured_outputs",
            )
        if wanted.type == "json_object":
            return json_grammar(None, "response_format")
        if wanted.json_schema is None:
            raise bad(
                "'response_format.json_schema' is missing. It is required for the type json_schema.", "response_format"
            )
        return json_grammar(wanted.json_schema.schema, "response_format.json_schema.schema")
    return None if outputs is None else _outputs(outputs)


def _outputs(outputs: StructuredOutputs) -> Grammar:
    given = [name for name in ("json", "regex", "grammar", "choice") if getattr(outputs, name) is not None]
    if len(given) != 1:
        raise bad("'structured_outputs' takes exactly one of json, regex, grammar, choice.", "structured_outputs")
    field = f"structured_outputs.{given[0]}"
    if outputs.json is not None:
        return json_grammar(outputs.json, field)
    if outputs.regex is not None:
        return checked(Grammar("regex", outputs.regex), field)
    if outputs.grammar is not None:
        return checked(Grammar("lark", outputs.grammar), field)
    if not outputs.choice or not all(outputs.choice):
        raise bad("'structured_outputs.choice' needs at least one text, none of them empty.", field)
    options = " | ".join(msgspec.json.encode(option).decode() for option in outputs.choice)
    return checked(Grammar("lark", f"start: {options}"), field)


def checked(grammar: Grammar, field: str) -> Grammar:
    """Refuse what is too long."""
    if len(grammar.text) > MAX_GRAMMAR:
        raise bad(f"'{field}' has {len(grammar.text)} characters. Allowed: {MAX_GRAMMAR}.", field)
    return grammar


def compile_grammar(grammar: Grammar, field: str) -> None:
    """Let llguidance read a grammar, as the engine will; may take long, so call it in a thread.

    Raises:
        ApiError: 400 with the compiler's sentence; 501 without llguidance.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ApiError(
            501,
            "Grammars need llguidance, which is not installed here. The operator can: pip install 'trimtab[serve]'.",
            param=field,
            retry=False,
        ) from None
    try:
        if grammar.kind == "json_schema":
            source = LLMatcher.grammar_from_json_schema(grammar.text)
        elif grammar.kind == "regex":
            source = LLMatcher.grammar_from_regex(grammar.text)
        else:
            source = LLMatcher.grammar_from_lark(grammar.text)
        broken, told = LLMatcher.validate_grammar_with_warnings(source)
    except ValueError as error:
        broken, told = True, [str(error)]
    if broken:
        raise bad(
            f"'{field}' cannot be enforced: {' '.join(' '.join(told).split())[:500]}. Simplify it.",
            field,
            "invalid_schema",
        )
