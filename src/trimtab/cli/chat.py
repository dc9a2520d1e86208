"""``trimtab chat``: a conversation in a terminal, techniques on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def chat(
        model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a .gguf file or a hub id.")],
        technique: Annotated[list[str], typer.Option("-t", "--technique", help="Spec string; repeatable.")] = [],  # noqa: B006
        system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
        gen: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
        top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
        top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
        min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
        repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
        seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
        stop: Annotated[list[str], typer.Option(help="Stop string; repeatable.")] = [],  # noqa: B006
        dtype: Annotated[str, typer.Option(help="Weights, as in `trimtab run`.")] = "auto",
        kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="Cache, as in `trimtab run`.")] = "float32",
        engine: Annotated[
            str, typer.Option(help="auto: the native program where the model can be lowered; native; torch.")
        ] = "auto",
        threads: Annotated[int, typer.Option(help="Threads; 0 is all this process may use.")] = 0,
        isa: Annotated[str, typer.Option(help="Instruction set: auto, scalar, avx2, avx512.")] = "auto",
        calibration: Annotated[Path | None, typer.Option(help="Text file techniques calibrate on.")] = None,
    ) -> None:
        """Talk with a model; every turn runs only what is new.

        /reset starts anew, /exit or the end of input leaves, Ctrl-C stops an answer. Where standard input is no terminal, every line
        is a turn. Tokens and times are told on standard error at the end.
        """
        import sys

        from trimtab.runtime.engine.sampling import SamplingParams
        from trimtab.runtime.engine.talk import Talk
        from trimtab.techniques.apply import load_engine
        from trimtab.techniques.materials import text_materials
        from trimtab.techniques.registry import parse_all
        from trimtab.ui.chat import converse

        params = SamplingParams(
            max_new_tokens=gen, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            repetition_penalty=repetition_penalty, stop=tuple(stop),
        )  # fmt: skip
        loaded, why = load_engine(
            model, engine=engine, dtype=dtype, kv_dtype=kv_dtype, techniques=parse_all(technique),
            materials=text_materials(calibration) if calibration else None, threads=threads, isa=isa,
        )  # fmt: skip
        if why:
            print(f"Runs in PyTorch: {why}", file=sys.stderr)
        converse(Talk(loaded, params, system))
