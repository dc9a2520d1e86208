"""Endpoints about the server: health, models, tokens, metrics, cancellation, administration."""

from __future__ import annotations

from trimtab import __version__
from trimtab.serve.call import Call
from trimtab.serve.errors import ApiError, bad
from trimtab.serve.front import Answer, Front, Json, Plain
from trimtab.serve.handlers.chat import functions_of
from trimtab.serve.messages import Load, Loaded, ModelInfo, Unload
from trimtab.serve.metrics import CONTENT_TYPE
from trimtab.serve.prompts import chat_prompt
from trimtab.serve.types.server import (
    Cancelled,
    DetokenizeReply,
    DetokenizeRequest,
    Draining,
    Health,
    LoadRequest,
    ModelCard,
    ModelList,
    Removed,
    TokenizeReply,
    TokenizeRequest,
    Version,
)


async def live(front: Front, call: Call) -> Answer:
    """The process answers."""
    return Json(Health(status="ok"))


async def ready(front: Front, call: Call) -> Answer:
    """Whether a request would be taken now: 200, or 503 while starting, restarting or draining."""
    front.check()
    return Json(Health(status="ok"))


async def version(front: Front, call: Call) -> Answer:
    """Of Trimtab."""
    return Json(Version(version=__version__))


async def metrics(front: Front, call: Call) -> Answer:
    """For Prometheus."""
    return Plain(front.metrics.text(), CONTENT_TYPE)


async def models(front: Front, call: Call) -> Answer:
    """Model ids this key may use; the first is the default."""
    front.check()
    found = {info.id: info for name, info in front.engine.models.items() if call.tenant.may_use(name)}
    return Json(ModelList(data=[_card(front, info) for info in found.values()]))


async def model(front: Front, call: Call) -> Answer:
    """One model id."""
    return Json(_card(front, front.model(call, call.path_params["model"])))


def _card(front: Front, info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.id, created=front.created, owned_by="trimtab", max_model_len=info.context, base=info.base,
        techniques=list(info.techniques), runs=info.runs,
    )  # fmt: skip


async def tokenize(front: Front, call: Call, request: TokenizeRequest) -> Answer:
    """Text, or messages, to token ids."""
    info = front.model(call, request.model)
    texts = await front.texts(info.base)
    if (request.prompt is None) == (request.messages is None):
        raise bad("Give 'prompt' or 'messages'; not both, not neither.", "prompt")
    if request.prompt is not None:
        ids = texts.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    else:
        asked = request.add_generation_prompt is not False
        ids = chat_prompt(
            texts.tokenizer, request.messages or [], functions_of(request.tools), add_generation_prompt=asked
        )
    strings = [texts.token(index)[0] for index in ids] if request.return_token_strs else None
    return Json(TokenizeReply(count=len(ids), max_model_len=info.context, tokens=ids, token_strs=strings))


async def detokenize(front: Front, call: Call, request: DetokenizeRequest) -> Answer:
    """Token ids to text."""
    info = front.model(call, request.model)
    texts = await front.texts(info.base)
    if request.tokens and max(request.tokens) >= info.vocab_size:
        raise bad(f"'tokens' holds {max(request.tokens)}. Allowed: 0..{info.vocab_size - 1}.", "tokens")
    return Json(DetokenizeReply(prompt=texts.tokenizer.decode(request.tokens)))


async def cancel(front: Front, call: Call) -> Answer:
    """End a request by the id its answer carries; only its own key, or an admin key, may."""
    name = call.path_params["id"]
    owner, end = front.open.get(name, ("", None))
    if end is None or (owner != call.tenant.entry.name and not call.tenant.entry.admin):
        raise ApiError(
            404,
            f"No open request has the id '{name[:128]}'. It has ended, or belongs to another key.",
            code="request_not_found",
        )
    end()
    return Json(Cancelled(id=name))


async def drain(front: Front, call: Call) -> Answer:
    """Take no new requests; the server ends with exit code 0 when the open ones have, or after the grace time."""
    front.on_drain()
    return Json(Draining(draining=True, open_requests=front.engine.open))


async def load(front: Front, call: Call, request: LoadRequest) -> Answer:
    """Add a model id while the server runs."""
    if request.model in front.engine.models:
        raise bad(f"The model '{request.model[:200]}' is served already.", "model")
    loaded = await front.engine.change(Load, request.model)
    assert isinstance(loaded, Loaded)
    return Json(_card(front, loaded.model), status=201)


async def unload(front: Front, call: Call) -> Answer:
    """Remove a model id once its requests have ended."""
    info = front.model(call, call.path_params["model"])
    if len({known.id for known in front.engine.models.values()}) == 1:
        raise bad(f"'{info.id}' is the only model. Add another first, or drain the server.", "model")
    await front.engine.change(Unload, info.id)
    return Json(Removed(id=info.id))
