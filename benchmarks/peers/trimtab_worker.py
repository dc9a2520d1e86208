"""Time Trimtab's own decoder for benchmarks/decode.py (see worker.py). Run by the python of .venv."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from worker import Timer, serve


def load(request: dict[str, Any]) -> tuple[Timer, dict[str, Any]]:
    """Load the model as a native program, and what is to be told of it."""
    from trimtab.runtime import kernels
    from trimtab.techniques.apply import load_native

    model = load_native(
        request["model"], techniques=request["techniques"], threads=request["threads"], kv_dtype="bfloat16"
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

    def timed(prompt: list[int], gen: int) -> dict[str, Any]:
        found = model.time(prompt, gen)
        steps = found.decode_s
        return {"prefill_s": found.prefill_s, "decode_s": sum(steps), "decoded": len(steps), "ids": list(found.ids)}

    told = {"version": version("trimtab"), "features": kernels.isa()}
    return timed, told | {"weight_bytes": read, "bits_per_weight": 8 * read / weights}


if __name__ == "__main__":
    serve(load)
