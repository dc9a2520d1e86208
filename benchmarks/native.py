"""The native program on SmolLM2-135M against Hugging Face transformers (eager, fp32) and torch's SDPA; interleaved rounds.

Usage: python benchmarks/native.py [--threads 2] [--rounds 7] [--gen 32] [--json FILE]. Prints three tables and writes
benchmarks/results/native.json: decode tokens/s of transformers in fp32, of the native program in fp32 and in the file's own
Q4_1; attention of one decode step at 8192 tokens, 30 layers, native kernel against SDPA; predicted and measured TPOT of the
native program where this machine is calibrated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import trimtab
from trimtab.measure.generation import synthetic_prompt
from trimtab.runtime import kernels
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.step import Recorder
from trimtab.spec.machine import this_machine_path
from trimtab.spec.workload import Workload
from trimtab.techniques.apply import load_native

HERE = Path(__file__).resolve().parent


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def hugging_face(threads: int) -> Any:
    """transformers' own Llama with the weights of the built-in model, eager attention, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = trimtab.load("smollm2-135m")
    spec, torch_threads = model.spec, threads
    layer: Any = spec.layers[0]
    config = LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=layer.mlp.intermediate_size,
        num_hidden_layers=len(spec.layers), num_attention_heads=layer.self_attn.num_attention_heads,
        num_key_value_heads=layer.self_attn.num_key_value_heads, head_dim=layer.self_attn.head_dim,
        max_position_embeddings=spec.max_position_embeddings, rms_norm_eps=layer.input_layernorm.eps,
        rope_theta=layer.self_attn.rope.theta, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    torch.set_num_threads(torch_threads)
    found = LlamaForCausalLM(config).eval()
    state = {f"model.{path}.weight": packed.buffers["data"] for path, packed in model.weights.items()}
    named = dict(found.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(np.array(state[name])).reshape(parameter.shape))
    return found


def decode_hf(model: Any, prompt: np.ndarray, gen: int) -> list[float]:
    steps = []
    with torch.inference_mode():
        done = model(torch.from_numpy(prompt)[None], use_cache=True)
        token = done.logits[:, -1:].argmax(-1)
        for _ in range(gen):
            start = time.perf_counter()
            done = model(token, past_key_values=done.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - start)
            token = done.logits[:, -1:].argmax(-1)
    return steps


def decode_table(threads: int, rounds: int, gen: int) -> dict[str, Any]:
    hf = hugging_face(threads)
    prompt = synthetic_prompt(49152, 64)
    arms: dict[str, Callable[[], list[float]]] = {"transformers eager, fp32": lambda: decode_hf(hf, prompt, gen)}
    for name, dtype in (("native, fp32", "float32"), ("native, Q4_1", "file")):
        native = load_native("smollm2-135m", dtype=dtype, threads=threads)
        arms[name] = lambda native=native: list(native.time(prompt.tolist(), gen + 1).decode_s)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            taken = float(np.median(arm()))
            if turn:
                seconds[name].append(taken)
    base = np.array(seconds["transformers eager, fp32"])
    return {
        name: {"tokens_per_s": spread([1 / s for s in taken]), "over_transformers": spread((base / taken).tolist())}
        for name, taken in seconds.items()
    }


def attention_table(threads: int, rounds: int, tokens: int = 8192) -> dict[str, Any]:
    """One decode step's attention over 30 layers of SmolLM2's shape, each with keys of its own: 377 MB in fp32."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}
    for kv_dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        native = load_native("smollm2-135m", threads=threads, kv_dtype=kv_dtype)
        session = Session(native.program)
        session.prefill([synthetic_prompt(49152, tokens - rounds - 4)], reserve=rounds + 3)
        session.record = Recorder()
        k, v = (torch.randn(30, 1, 3, tokens, 64).to(kind) for _ in range(2))
        q = torch.randn(30, 1, 9, 1, 64).to(kind)
        ours, theirs, bytes_read = [], [], 0
        for turn in range(rounds + 1):
            session.decode([5])
            metered = [row for row in native.program.metered() if row[0].endswith("attend")]
            bytes_read = sum(row[2] for row in metered)
            taken = sum(row[5] for row in metered)
            start = time.perf_counter()
            with torch.inference_mode():
                for layer in range(30):
                    F.scaled_dot_product_attention(q[layer], k[layer], v[layer], enable_gqa=True)
            other = time.perf_counter() - start
            if turn:
                ours.append(taken), theirs.append(other)
        heads = native.spec.layers[0].cache.heads
        held = session.lengths[0]
        found[kv_dtype] = {
            "native_s": spread(ours),
            "sdpa_s": spread(theirs),
            "ratio": spread((np.array(theirs) / ours).tolist()),
            "kv_read": bytes_read,
            "kv_read_by_the_graph": sum(head.read_bytes(held - 1, 1) for head in heads) * 30,
        }
        session.close()
    return found


def prediction_table(threads: int) -> dict[str, Any]:
    """TPOT of the native program, predicted by the stack `native` and measured, at contexts 128 and 4096."""
    if not this_machine_path().exists():
        return {}
    found = {}
    arms = (("float32", ()), ("bfloat16", ()), ("float32", ("rtn:bits=8,group=64",)), ("float32", ("rtn:bits=4,group=64",)),
            ("float32", ("rtn:bits=2,group=64",)))  # fmt: skip
    for dtype, techniques in arms:
        native = load_native("smollm2-135m", dtype=dtype, techniques=techniques, threads=threads)
        for context in (128, 4096):
            report = trimtab.predict(
                model="smollm2-135m", machine="this", stack="native", dtype=dtype, kv_dtype="float32",
                techniques=techniques, workload=Workload(batch=1, prompt=context, gen=17),
            )  # fmt: skip
            taken = float(np.median(native.time(synthetic_prompt(49152, context).tolist(), 17).decode_s))
            predicted = report.figures["tpot_s"].value or 0.0
            name = f"{dtype} {' '.join(techniques)} context {context}"
            found[name] = {"predicted_s": predicted, "measured_s": taken, "error": predicted / taken - 1}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "native.json")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    record: dict[str, Any] = {
        "commit": commit.stdout.strip(), "threads": args.threads, "rounds": args.rounds, "isa": kernels.isa(),
        "load": os.getloadavg()[0], "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    record["decode"] = decode_table(args.threads, args.rounds, args.gen)
    for name, row in record["decode"].items():
        rate, ratio = row["tokens_per_s"], row["over_transformers"]
        print(f"{name:28} {rate['median']:7.1f} tok/s ({rate['p10']:.1f} to {rate['p90']:.1f})  {ratio['median']:.2f}x")
    record["attention"] = attention_table(args.threads, args.rounds)
    for name, row in record["attention"].items():
        print(
            f"attention at 8192, {name:9} native {1e3 * row['native_s']['median']:.1f} ms, SDPA {1e3 * row['sdpa_s']['median']:.1f} ms: "
            f"{row['ratio']['median']:.2f}x ({row['ratio']['p10']:.2f} to {row['ratio']['p90']:.2f}); read {row['kv_read']} bytes, "
            f"the graph {row['kv_read_by_the_graph']}"
        )
    record["prediction"] = prediction_table(args.threads)
    for name, row in record["prediction"].items():
        print(
            f"{name:44} predicted {1e3 * row['predicted_s']:.2f} ms, measured {1e3 * row['measured_s']:.2f} ms ({row['error']:+.1%})"
        )
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
