"""Mean negative log-likelihood that llama.cpp gives to windows of tokens. Run by a python that has llama-cpp-python.

Usage: llama_cpp_nll.py MODEL.gguf WINDOWS.json [THREADS]: a list of lists of token ids; each is read from an empty cache and
all its tokens but the first are scored. Prints JSON: {"nats": mean, "tokens": scored}.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

_SILENT = llama_cpp.llama_log_callback(lambda *_: None)


def main(path: str, windows: list[list[int]], threads: int) -> dict[str, float]:
    """Score the windows."""
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp could not load {path}")
    longest = max(map(len, windows))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit(f"llama.cpp could not make a context for {path}")
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    total, count = 0.0, 0
    for window in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for place, token in enumerate(window):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
        if code := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode returned {code}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(window), width)).astype(np.float64)
        peak = logits.max(axis=1)
        log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        total += float((log_sum[:-1] - logits[np.arange(len(window) - 1), window[1:]]).sum())
        count += len(window) - 1
        llama_cpp.llama_batch_free(batch)
    return {"nats": total / count, "tokens": count}


if __name__ == "__main__":
    held = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps(main(sys.argv[1], held, int(sys.argv[3]) if len(sys.argv) > 3 else 1)))
