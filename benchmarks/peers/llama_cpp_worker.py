"""Time llama.cpp for benchmarks/decode.py and kv_decode.py (see worker.py). Run by the python of .venv-peers.

Only llama_decode and its synchronization are timed, on llama.cpp's low-level interface: no sampling, no text.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from worker import Timer, serve

CONTEXT, BATCH = 1024, 512
_SILENT = llama_cpp.llama_log_callback(lambda *_: None)


class Peer:
    """A loaded model with its context."""

    def __init__(self, model: str, threads: int, kv: str, context: int) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        if kv:  # codes of keys and values are only read by its fused attention
            params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{kv.upper()}")
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {model}")
        self.capacity, self.held, self.token = context, 0, 0
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def step(self, ids: list[int]) -> tuple[float, int]:
        """Seconds that these tokens take, and the likeliest next one."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))  # logits of the last token only
        start = time.perf_counter()
        code = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (self.vocabulary,))
        return seconds, int(logits.argmax())

    def time(self, prompt: list[int], gen: int) -> dict[str, Any]:
        """A prompt and what follows; without a prompt, what follows further."""
        if len(prompt) + (0 if prompt else self.held) + gen > self.capacity:
            raise ValueError(f"at most {self.capacity} tokens with what is generated")
        prefill = 0.0
        if prompt:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
            for first in range(0, len(prompt), BATCH):
                seconds, self.token = self.step(prompt[first : first + BATCH])
                prefill += seconds
            self.held = len(prompt)
        ids, decode = [self.token], 0.0
        for _ in range(gen - 1):
            seconds, self.token = self.step([self.token])
            decode += seconds
            ids.append(self.token)
        self.held += gen - 1
        return {"prefill_s": prefill, "decode_s": decode, "decoded": gen - 1, "ids": ids}


def load(request: dict[str, Any]) -> tuple[Timer, dict[str, Any]]:
    peer = Peer(request["model"], request["threads"], request.get("kv", ""), request.get("context", CONTEXT))
    features = llama_cpp.llama_print_system_info().decode().strip()
    return peer.time, {"version": llama_cpp.__version__, "features": features}


if __name__ == "__main__":
    serve(load)
