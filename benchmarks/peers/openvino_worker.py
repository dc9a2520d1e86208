"""Time OpenVINO GenAI for benchmarks/decode.py (see worker.py). Run by the python of .venv-peers.

The figures are those of the library itself (perf_metrics): the time to the first token, and the gaps between the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Timer, serve


class Peer:
    """A loaded model."""

    def __init__(self, model: str, threads: int) -> None:
        # As LLMPipeline sets itself up for one request, but nothing kept of the prompt: each one is to be processed.
        schedule = openvino_genai.SchedulerConfig()
        schedule.max_num_batched_tokens = 2**20
        schedule.enable_prefix_caching = False
        self.pipeline = openvino_genai.LLMPipeline(
            model, "CPU", INFERENCE_NUM_THREADS=threads, scheduler_config=schedule
        )

    def time(self, prompt: list[int], gen: int) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig(max_new_tokens=gen, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        tokens = openvino.Tensor(np.array([prompt], np.int64))
        found = self.pipeline.generate(tokens, config)
        ids = [int(token) for token in found.tokens[0]]
        if len(ids) != gen:
            raise RuntimeError(f"OpenVINO made {len(ids)} tokens instead of {gen}")
        raw = found.perf_metrics.raw_metrics
        return {
            "prefill_s": found.perf_metrics.get_ttft().mean / 1e3,
            "decode_s": found.perf_metrics.get_tpot().mean / 1e3 * (gen - 1) if gen > 1 else 0.0,
            "decoded": gen - 1,
            "ids": ids,
            "inference_s": [float(us) / 1e6 for us in raw.token_infer_durations],
        }


def load(request: dict[str, Any]) -> tuple[Timer, dict[str, Any]]:
    peer, core = Peer(request["model"], request["threads"]), openvino.Core()
    wanted = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES", "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
    features = "; ".join(f"{name}={core.get_property('CPU', name)}" for name in wanted)
    return peer.time, {"version": openvino_genai.__version__, "features": features}


if __name__ == "__main__":
    serve(load)
