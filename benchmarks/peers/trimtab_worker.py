"""Time Trimtab's own decoder for benchmarks/decode.py and kv_decode.py (see worker.py). Run by the python of .venv."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from worker import Timer, serve


def load(request: dict[str, Any]) -> tuple[Timer, dict[str, Any]]:
    """Load the model as a native program, and what is to be told of it."""
    import numpy as np

    from trimtab.runtime import kernels
    from trimtab.runtime.engine.generate import Session
    from trimtab.techniques.apply import load_native

    model = load_native(
        request["model"],
        techniques=request["techniques"],
        threads=request["threads"],
        kv_dtype=request.get("kv", "bfloat16"),
    )
    spec = model.spec
    # What a step reads: every matrix once, of the embedding one row unless the head is tied to it.
    unread = (
        0
        if spec.tie_word_embeddings
        else spec.embed_tokens.nbytes() - spec.embed_tokens.format.row_nbytes(spec.hidden_size)
    )
    read = model.program.weight_bytes - unread
    weights = spec.num_parameters() - (0 if spec.tie_word_embeddings else spec.embed_tokens.num_parameters())

    session, token = Session(model.program), 0

    def go_on(prompt: list[int], gen: int) -> dict[str, Any]:
        """A prompt and what follows, in a session that stays; without a prompt, what follows further."""
        nonlocal session, token
        prefill, ids, seconds = 0.0, [], 0.0
        if prompt:
            session.close()
            session = Session(model.program)
            start = time.perf_counter()
            token = int(np.argmax(session.prefill([prompt])[0]))
            prefill = time.perf_counter() - start
        ids.append(token)
        for _ in range(gen - 1):
            start = time.perf_counter()
            logits = session.decode([token])
            seconds += time.perf_counter() - start
            token = int(np.argmax(logits[0]))
            ids.append(token)
        told = session.store.nbytes().reserved
        return {"prefill_s": prefill, "decode_s": seconds, "decoded": gen - 1, "ids": ids, "kv_bytes": told}

    def timed(prompt: list[int], gen: int) -> dict[str, Any]:
        found = model.time(prompt, gen)
        steps = found.decode_s
        return {"prefill_s": found.prefill_s, "decode_s": sum(steps), "decoded": len(steps), "ids": list(found.ids)}

    told = {"version": version("trimtab"), "features": kernels.isa()}
    return go_on if "context" in request else timed, told | {
        "weight_bytes": read,
        "bits_per_weight": 8 * read / weights,
    }


if __name__ == "__main__":
    serve(load)
