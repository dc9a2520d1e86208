"""``trimtab run``: generate text, with techniques on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def run(
        model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a .gguf file or a hub id.")],
        prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from standard input.")] = None,
        technique: Annotated[list[str], typer.Option("-t", "--technique", help="Spec string; repeatable.")] = [],  # noqa: B006
        gen: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
        prompt_tokens: Annotated[
            int, typer.Option("--prompt-tokens", help="Time a synthetic prompt of this many tokens instead of a text.")
        ] = 0,
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
        top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
        top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
        min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
        repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
        seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
        stop: Annotated[list[str], typer.Option(help="Stop string; repeatable.")] = [],  # noqa: B006
        raw: Annotated[
            bool, typer.Option("--raw", help="Feed the prompt as it is, without the chat template.")
        ] = False,
        ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
        dtype: Annotated[
            str,
            typer.Option(
                help="Weights: float32, bfloat16, float16, or file (as stored, quantized blocks too). auto: file natively, else float32."
            ),
        ] = "auto",
        kv_dtype: Annotated[
            str,
            typer.Option(
                "--kv-dtype",
                help="Cache: float32, bfloat16, float16, int8; in PyTorch also fp8, int4, int2, or int4-g32.",
            ),
        ] = "float32",
        engine: Annotated[
            str, typer.Option(help="auto: the native program where the model can be lowered; native; torch.")
        ] = "auto",
        threads: Annotated[int, typer.Option(help="Threads; 0 is all this process may use.")] = 0,
        isa: Annotated[str, typer.Option(help="Instruction set: auto, scalar, avx2, avx512.")] = "auto",
        calibration: Annotated[Path | None, typer.Option(help="Text file techniques calibrate on.")] = None,
        explain: Annotated[
            bool, typer.Option("--explain", help="List which ops run where, and generate nothing.")
        ] = False,
        json: Annotated[bool, typer.Option("--json", help="Print JSON when done instead of streaming.")] = False,
    ) -> None:
        """Generate text and stream it to stdout, or time a generation."""
        import sys

        from trimtab.errors import SpecError
        from trimtab.measure.generation import timed_report
        from trimtab.techniques.apply import load_engine
        from trimtab.techniques.materials import text_materials
        from trimtab.techniques.registry import parse_all
        from trimtab.ui.generation import print_engine, print_timing
        from trimtab.ui.output import print_json

        if (prompt is None) == (prompt_tokens == 0) and not explain:
            raise SpecError("Give a prompt, or --prompt-tokens N to time a synthetic one; not both, not neither.")
        if prompt_tokens < 0 or gen < 1:
            raise SpecError(f"--prompt-tokens {prompt_tokens} --gen {gen}: not possible. Allowed: 1 or more of each.")
        chosen = parse_all(technique)
        materials = text_materials(calibration) if calibration else None
        loaded, why = load_engine(
            model, engine=engine, dtype=dtype, kv_dtype=kv_dtype, techniques=chosen, materials=materials,
            threads=threads, isa=isa,
        )  # fmt: skip
        if why:
            print(f"Runs in PyTorch: {why}", file=sys.stderr)
        if explain:
            return print_engine(loaded, why, json)
        if prompt_tokens:
            report = timed_report(loaded, prompt_tokens, gen, [str(t) for t in chosen])
            return print_json(report.to_dict()) if json else print_timing(report)
        text = sys.stdin.read() if prompt == "-" else prompt
        options: dict[str, Any] = dict(
            max_new_tokens=gen, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            repetition_penalty=repetition_penalty, stop=tuple(stop), ignore_eos=ignore_eos, chat=not raw,
        )  # fmt: skip
        if json:
            output = loaded.generate(text, **options)
            return print_json(
                {"schema": 1, "text": output.text, "ids": list(output.ids), "techniques": [str(t) for t in chosen]}
            )
        for piece in loaded.generate(text, stream=True, **options):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
