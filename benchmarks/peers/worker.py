"""The protocol between benchmarks/decode.py, kv_decode.py and those they time: one JSON line asks, one answers.

First ``{"model": path, "threads": n, ...}``, answered by what is to be told of the contestant; then any number of
``{"prompt": [ids], "gen": n}``, answered by ``{"prefill_s", "decode_s", "decoded", "ids"}``. What goes wrong is answered as
``{"error": ...}``. With ``"context": tokens`` in the first line a prompt stays, and an empty one asks for what follows further;
``"kv"`` names the format of keys and values.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

#: Times one generation: prompt, number of new tokens.
Timer = Callable[[list[int], int], dict[str, Any]]


def serve(load: Callable[[dict[str, Any]], tuple[Timer, dict[str, Any]]]) -> None:
    """Answer the lines of standard input until it ends."""
    timer: Timer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if timer is None:
                timer, told = load(request)
                answer = {"ready": True} | told
            else:
                answer = timer(request["prompt"], request["gen"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
