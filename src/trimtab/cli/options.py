"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="smollm2-135m, a catalogue id, a folder, a .gguf file or a hub id.")
]
On = Annotated[
    str | None,
    typer.Option("--on", metavar="MACHINE", help="Machine id or alias; default: this one once calibrated, else a100."),
]
Stack = Annotated[
    str | None,
    typer.Option("--stack", help="Software: vllm, sglang, trtllm, llama.cpp, hf-eager, datasheet, ideal, this."),
]
Batch = Annotated[int, typer.Option("--batch", help="Sequences side by side.")]
Prompt = Annotated[int, typer.Option("--prompt", help="Prompt tokens of each sequence.")]
Gen = Annotated[int, typer.Option("--gen", help="Tokens generated for each sequence.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Weights and activations: float32, bfloat16, float16, fp8, mxfp4, or file to keep quantized blocks.",
    ),
]
KVDtype = Annotated[str, typer.Option("--kv-dtype", help="Cache: float32, bfloat16, float16, fp8, int8 or int4.")]
Techniques = Annotated[
    list[str] | None, typer.Option("-t", "--technique", metavar="SPEC", help="Technique; repeatable, in order.")
]
Tp = Annotated[int, typer.Option("--tp", help="Tensor parallel: devices every matrix is cut over.")]
Pp = Annotated[int, typer.Option("--pp", help="Pipeline parallel: stages the layers are cut into.")]
Dp = Annotated[int, typer.Option("--dp", help="Data parallel: replicas that share the sequences.")]
Ep = Annotated[int, typer.Option("--ep", help="Expert parallel: devices the experts are spread over.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers of a list like ``1|2|4``.

    Raises:
        SpecError: something else, or a number below 1.
    """
    from trimtab.errors import SpecError

    parts = text.replace(",", "|").split("|")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise SpecError(f"--{name} {text!r} is not a list of whole numbers of 1 or more. Write for example 1|2|4.")
    return sorted({int(part) for part in parts})
