"""Command lines that start a serving engine the way a candidate was priced.

An engine is refused what it cannot do: a technique of Trimtab it does not know, a dtype it has no flag for.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from trimtab.errors import SpecError, unknown
from trimtab.predict.search import Candidate
from trimtab.spec.configs import catalogue_entry
from trimtab.spec.formats import DTYPE_ALIASES

_FULL = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def vllm(candidate: Candidate, model: str, context: int) -> str:
    """The ``vllm serve`` command. Source: engine arguments of vLLM 0.6 and later."""
    parallel, stack = candidate.parallel, candidate.stack
    parts = ["vllm", "serve", model]
    parts += _degree("--tensor-parallel-size", parallel.tp)
    parts += _degree("--pipeline-parallel-size", parallel.pp)
    parts += _degree("--data-parallel-size", parallel.dp)
    if parallel.ep > 1:
        parts.append("--enable-expert-parallel")
    parts += _dtype(candidate, "vLLM", kv_fp8="fp8")
    parts += ["--max-model-len", str(context), "--max-num-seqs", str(-(-candidate.concurrency // parallel.dp))]
    if stack.max_batched_tokens:
        parts += ["--max-num-batched-tokens", str(stack.max_batched_tokens)]
    parts += ["--gpu-memory-utilization", f"{stack.memory_share:g}"]
    return shlex.join(parts)


def sglang(candidate: Candidate, model: str, context: int) -> str:
    """The ``sglang.launch_server`` command. Source: server arguments of SGLang 0.5."""
    parallel, stack = candidate.parallel, candidate.stack
    parts = ["python", "-m", "sglang.launch_server", "--model-path", model]
    parts += _degree("--tp-size", parallel.tp)
    parts += _degree("--pp-size", parallel.pp)
    parts += _degree("--dp-size", parallel.dp)
    parts += _degree("--ep-size", parallel.ep)
    parts += _dtype(candidate, "SGLang", kv_fp8="fp8_e4m3")
    parts += ["--context-length", str(context), "--max-running-requests", str(-(-candidate.concurrency // parallel.dp))]
    if stack.max_batched_tokens:
        parts += ["--chunked-prefill-size", str(stack.max_batched_tokens)]
    parts += ["--mem-fraction-static", f"{stack.memory_share:g}"]
    return shlex.join(parts)


ENGINES: dict[str, Callable[[Candidate, str, int], str]] = {"vllm": vllm, "sglang": sglang}


def command_line(candidate: Candidate, engine: str, context: int) -> str:
    """The command that starts `engine` for a candidate.

    Args:
        candidate: of `search`.
        engine: ``vllm`` or ``sglang``.
        context: most tokens of a request, prompt and generated.

    Raises:
        SpecError: another engine, or one that cannot do what the candidate asks for.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    techniques = candidate.variant.techniques
    if techniques:
        raise SpecError(
            f"{engine} does not know {', '.join(techniques)}. Allowed: candidates without techniques; "
            "`trimtab run` and `measure` apply them."
        )
    return ENGINES[engine](candidate, hub_id(candidate.variant.spec.name), context)


def hub_id(name: str) -> str:
    """The Hugging Face id of a catalogued model, else the name itself."""
    try:
        aliases = catalogue_entry(name).get("_aliases", ())
    except SpecError:
        return name
    return next((alias for alias in aliases if "/" in alias), name)


def _degree(flag: str, value: int) -> list[str]:
    return [flag, str(value)] if value > 1 else []


def _dtype(candidate: Candidate, engine: str, kv_fp8: str) -> list[str]:
    """Flags of the weights' and the cache's dtype; activations stay in bf16 beside fp8 weights."""
    dtype, kv_dtype = candidate.variant.dtype, candidate.variant.kv_dtype
    if dtype == "fp8":
        parts = ["--dtype", "bfloat16", "--quantization", "fp8"]
    elif dtype == "mxfp4":  # such checkpoints say so themselves
        parts = ["--dtype", "bfloat16"]
    elif dtype in DTYPE_ALIASES:
        parts = ["--dtype", _FULL[DTYPE_ALIASES[dtype]]]
    else:
        raise SpecError(f"{engine} has no flag for weights in {dtype}. Allowed: float16, bfloat16, fp8, mxfp4.")
    if kv_dtype == "fp8":
        return [*parts, "--kv-cache-dtype", kv_fp8]
    if DTYPE_ALIASES.get(kv_dtype, kv_dtype) != DTYPE_ALIASES.get(dtype, "bf16"):
        raise SpecError(
            f"{engine} has no flag for a cache in {kv_dtype} beside weights in {dtype}. Allowed: fp8, or the same."
        )
    return parts
