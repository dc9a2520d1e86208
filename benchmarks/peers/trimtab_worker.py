"""Time Trimtab's own decoder for benchmarks/decode.py: one JSON line asks, one answers. Run by the python of .venv."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
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
    told = {"ready": True, "version": version("trimtab"), "features": kernels.isa()}
    return model, told | {"weight_bytes": read, "bits_per_weight": 8 * read / weights}


def timed(model: Any, prompt: list[int], gen: int) -> dict[str, Any]:
    """Seconds of the prompt and of the later steps together."""
    found = model.time(prompt, gen)
    steps = found.decode_s
    return {"prefill_s": found.prefill_s, "decode_s": sum(steps), "decoded": len(steps), "ids": list(found.ids)}


def main() -> None:
    program: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if program is None:
                program, answer = load(request)
            else:
                answer = timed(program, request["prompt"], request["gen"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
