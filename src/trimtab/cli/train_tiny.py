"""``trimtab train tiny``: a tiny model in float32, for what a model of rounded weights cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json


def register(group: typer.Typer) -> None:
    """Add the command to the group of `train`."""

    @group.command("tiny")
    def tiny(
        text: Annotated[
            list[Path] | None,
            typer.Option(help="Text file to train on; repeatable. Default: half of the built-in text."),
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="Folder of the model; default: one that is kept for these settings.")
        ] = None,
        valid: Annotated[
            str | None,
            typer.Option(help="Held-out text: a file, or topics; default: topics if no --text is given, else none."),
        ] = None,
        steps: Annotated[int | None, typer.Option(help="Updates; default 700.")] = None,
        minutes: Annotated[
            float | None, typer.Option(help="In place of --steps: as many as fit on this machine.")
        ] = None,
        layers: Annotated[int, typer.Option(help="Layers.")] = 4,
        hidden: Annotated[int, typer.Option(help="Hidden size.")] = 256,
        ffn: Annotated[int, typer.Option(help="Neurons of a feed-forward block.")] = 704,
        heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
        kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 2,
        vocab: Annotated[int, typer.Option(help="Tokens of the BPE trained on the text; 257: bytes.")] = 2048,
        context: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
        batch: Annotated[int, typer.Option(help="Windows of an update.")] = 8,
        lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
        seed: Annotated[int, typer.Option(help="Of the first weights and the order of the text.")] = 0,
        threads: Annotated[int, typer.Option(help="Threads; 0 = as many as this process may use.")] = 0,
        json: Json = False,
    ) -> None:
        """Train a tiny Llama from scratch in float32: about 4 minutes on 2 cores. The folder opens as any model."""
        from trimtab.errors import SpecError
        from trimtab.measure.texts import read_text
        from trimtab.train.tiny import TinyConfig, folder_of, steps_within, train_tiny, whole_folder

        config = TinyConfig(
            layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads, vocab=vocab, context=context,
            batch=batch, lr=lr,
        )  # fmt: skip
        if steps is not None and minutes is not None:
            raise SpecError("--steps and --minutes are both given. Give one of them.")
        texts = [read_text(str(source)) for source in text or ("topics-calibration",)]
        held_out = read_text(valid or "topics") if valid or not text else None

        import time

        import torch

        import trimtab
        from trimtab.measure.bits import bits_per_byte, ngram_bits_per_byte
        from trimtab.ui.output import print_json
        from trimtab.ui.progress import bars

        if threads:
            torch.set_num_threads(threads)
        count = steps_within(config, minutes) if minutes is not None else 700 if steps is None else steps
        folder = folder_of(config, texts, count, seed) if out is None else out
        kept = out is None and folder.is_dir()
        start = time.perf_counter()
        losses: list[float] = []
        report: dict[str, object] = {"schema": 1, "folder": str(folder), "steps": count, "kept": kept}
        with bars() as progress:
            if not kept:
                with whole_folder(folder) as fresh:  # refuses a name that is taken now, not in four minutes
                    found = train_tiny(config, texts, count, seed, progress=progress)
                    found.write(fresh)
                losses = found.losses.tolist()
                report |= {"time_s": time.perf_counter() - start, "loss": losses}
            loaded = trimtab.load(folder)
            if held_out is not None:
                floors = {
                    order: ngram_bits_per_byte("\n\n".join(texts).encode(), held_out.encode(), order)
                    for order in progress("n-grams", range(3, 8))
                }
                report["bits_per_byte"] = bits_per_byte(loaded, held_out, context, 128, progress)
                report["ngram_bits_per_byte"] = min(floors.values())
                report["ngram_order"] = min(floors, key=lambda order: floors[order])
        if json:
            return print_json(report)
        millions = loaded.spec.num_parameters() / 1e6
        typer.echo(
            f"{folder}: {millions:.2f} M parameters in fp32, {count} steps of {batch * context} tokens, seed {seed}"
        )
        if kept:
            typer.echo("it was trained before with these settings")
        else:
            last = losses[-max(1, count // 20) :]
            typer.echo(
                f"loss {losses[0]:.3f} nats at first, {sum(last) / len(last):.3f} at last; {report['time_s']:.0f} s"
            )
        if held_out is not None:
            typer.echo(
                f"held-out text: {report['bits_per_byte']:.3f} bits per byte; counting n-grams of {report['ngram_order']} bytes "
                f"{report['ngram_bits_per_byte']:.3f}"
            )
        typer.echo(f"use it: trimtab eval text {folder} --tokens {context} -t rtn:bits=4")
