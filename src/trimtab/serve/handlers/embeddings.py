"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
from contextlib import aclosing

import numpy as np

from trimtab.serve.call import Call
from trimtab.serve.errors import ApiError, bad
from trimtab.serve.front import Answer, Front, Json
from trimtab.serve.generation import Generation, allowed_priority, check_prompts, encode_texts, salt
from trimtab.serve.messages import Embed
from trimtab.serve.types.embeddings import Embedding, EmbeddingReply, EmbeddingRequest, EmbeddingUsage

#: Most inputs of one request.
MAX_INPUTS = 256


async def embeddings(front: Front, call: Call, request: EmbeddingRequest) -> Answer:
    """Turn texts into vectors of unit length.

    `dimensions` keeps the first so many numbers and scales them to unit length again, which is what models trained for
    it (Matryoshka) expect; others lose quality.

    Raises:
        ApiError: any refusal.
    """
    model = front.model(call, request.model)
    width = model.hidden_size if request.dimensions is None else request.dimensions
    if width > model.hidden_size:
        raise bad(f"'dimensions' is {width}. Allowed: 1..{model.hidden_size} for {model.id}.", "dimensions")
    texts = await front.texts(model.base)
    prompts = await encode_texts(texts, request.input, model, "input")
    if len(prompts) > MAX_INPUTS:
        raise bad(f"'input' holds {len(prompts)} texts. Allowed: {MAX_INPUTS}. Send them in several requests.", "input")
    check_prompts(front, prompts, "input")
    longest = max(map(len, prompts))
    if longest > model.context:
        raise ApiError(
            400, f"An input has {longest} tokens; the context of {model.id} is {model.context}. Shorten it.", param="input",
            code="context_length_exceeded",
        )  # fmt: skip
    name = call.new_id("embd")
    requests = [
        Embed(
            id=f"{name}-{place}", model=model.id, prompt=tuple(prompt), pooling=request.pooling or "mean", salt=salt(call, request),
            priority=allowed_priority(call, request), deadline_s=front.config.request_s,
        )
        for place, prompt in enumerate(prompts)
    ]  # fmt: skip
    with (generation := Generation(front, call, model, name, requests)):
        async with aclosing(generation.events()) as events:
            async for _ in events:
                pass
    vectors = [_cut(np.frombuffer(generation.vectors[place], dtype="<f4"), width) for place in range(len(prompts))]
    as_text = request.encoding_format == "base64"
    found = [
        Embedding(index=place, embedding=base64.b64encode(vector.tobytes()).decode() if as_text else vector.tolist())
        for place, vector in enumerate(vectors)
    ]
    used = EmbeddingUsage(generation.prompt_tokens, generation.prompt_tokens)
    return Json(EmbeddingReply(data=found, model=request.model, usage=used))


def _cut(vector: np.ndarray, width: int) -> np.ndarray:
    if width == len(vector):
        return vector
    kept = vector[:width]
    length = float(np.linalg.norm(kept))
    return (kept / length if length else kept).astype("<f4")
