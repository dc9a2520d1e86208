"""``trimtab train``: learn what a technique needs, the model's weights frozen; or a tiny model from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import train_tiny
from trimtab.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the verb and its kinds."""
    group = typer.Typer(help="Learn what a technique needs, or a tiny model from scratch.", no_args_is_help=True)

    @group.callback()
    def kinds() -> None:
        """Learn what a technique needs, or a tiny model from scratch."""

    @group.command("duo")
    def duo(
        model: Annotated[
            str, typer.Argument(metavar="MODEL", help="smollm2-135m, a folder, a .gguf file or a hub id.")
        ],
        out: Annotated[Path, typer.Option(help="File of the gates, for duo:gates=FILE.")],
        steps: Annotated[int, typer.Option(help="Samples, one a step.")] = 150,
        sink: Annotated[int, typer.Option(help="First tokens a streaming head sees.")] = 16,
        recent: Annotated[int, typer.Option(help="Most recent tokens a streaming head sees.")] = 128,
        needles: Annotated[int, typer.Option(help="Passkeys of a sample.")] = 4,
        words: Annotated[int, typer.Option(help="Words of a passkey.")] = 8,
        min_tokens: Annotated[int, typer.Option(help="Tokens of the shortest text.")] = 256,
        max_tokens: Annotated[int, typer.Option(help="Tokens of the longest text.")] = 1024,
        lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.02,
        l1: Annotated[float, typer.Option(help="Weight of the mean gate in the loss.")] = 0.05,
        seed: Annotated[int, typer.Option(help="Of lengths, texts, depths and passkeys.")] = 0,
        text: Annotated[
            str, typer.Option(help="Text to hide passkeys in: a file, or topics: the built-in calibration text.")
        ] = "topics",
        threads: Annotated[int, typer.Option(help="Threads; 0 = as many as this process may use.")] = 0,
        json: Json = False,
    ) -> None:
        """Train one gate per KV head: which heads need the whole context? About 10 minutes for smollm2-135m on 2 cores."""
        from trimtab.train.gates import GateTraining

        how = GateTraining(
            steps=steps, sink=sink, recent=recent, needles=needles, words=words, min_tokens=min_tokens,
            max_tokens=max_tokens, lr=lr, l1=l1, seed=seed,
        )  # fmt: skip
        import time

        import numpy as np
        import torch

        import trimtab
        from trimtab import __version__
        from trimtab.runtime.text.builtin import builtin_text, split
        from trimtab.techniques.cache._gates import write_gates
        from trimtab.techniques.materials import text_materials
        from trimtab.train.duo_gates import train_gates
        from trimtab.ui.output import print_json
        from trimtab.ui.progress import bars

        haystack = (
            split(builtin_text())[0] if text == "topics" else "\n\n".join(text_materials(Path(text)).texts.values())
        )
        loaded = trimtab.load(model)
        if threads:
            torch.set_num_threads(threads)
        start = time.perf_counter()
        with bars() as progress:
            found = train_gates(loaded.spec, loaded.weights, loaded.tokenizer, haystack, how, progress)
        took = time.perf_counter() - start
        losses = found.losses
        peak = int(losses.argmax())
        last = float(np.mean(losses[-max(1, steps // 10) :]))
        command = (
            f"trimtab train duo {model} --steps {steps} --sink {sink} --recent {recent} --needles {needles} --words {words} "
            f"--min-tokens {min_tokens} --max-tokens {max_tokens} --lr {lr:g} --l1 {l1:g} --seed {seed} --text {text}"
        )
        notes = [
            f"made by: {command} (trimtab {__version__})",
            f"loss: {losses[0]:.4f} at first, {losses[peak]:.4f} at its peak (step {peak}), {last:.4f} over the last tenth of the steps",
        ]
        write_gates(out, found.gates, [loaded.spec.name], notes)
        median, above = float(np.median(found.gates)), float((found.gates > 0.5).mean())
        if json:
            return print_json(
                {
                    "schema": 1, "model": model, "file": str(out), "gates": found.gates.tolist(), "time_s": took,
                    "loss": losses.tolist(), "distilled": found.distilled,
                }
            )  # fmt: skip
        typer.echo(
            f"{found.gates.size} gates of {loaded.spec.name} in {out}: median {median:.3f}, {above:.0%} above 0.5"
        )
        typer.echo(f"loss {losses[0]:.4f}, peak {losses[peak]:.4f} at step {peak}, last tenth {last:.4f}; {took:.0f} s")
        typer.echo(f'use them: -t duo:sink={sink},recent={recent},gates="{out}"')

    train_tiny.register(group)
    app.add_typer(group, name="train")
