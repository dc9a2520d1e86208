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
    str | None, typer.Option("--stack", help="How well software uses the machine: ideal, datasheet, this.")
]
Batch = Annotated[int, typer.Option("--batch", help="Sequences side by side.")]
Prompt = Annotated[int, typer.Option("--prompt", help="Prompt tokens of each sequence.")]
Gen = Annotated[int, typer.Option("--gen", help="Tokens generated for each sequence.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Weights and activations: float32, bfloat16, float16, or file to keep quantized blocks."
    ),
]
KVDtype = Annotated[str, typer.Option("--kv-dtype", help="Cache: float32, bfloat16 or float16.")]
Techniques = Annotated[
    list[str] | None, typer.Option("-t", "--technique", metavar="SPEC", help="Technique; repeatable, in order.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
