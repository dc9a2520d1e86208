"""``trimtab denoise``: the runtime of a service without contention, from a log of timed requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def denoise(
        log: Annotated[
            Path,
            typer.Argument(
                metavar="LOG.jsonl",
                help='Lines {"prompt_tokens": P, "output_tokens": O, "seconds": S}, several trials of each pair.',
            ),
        ],
        overhead: Annotated[
            float | None,
            typer.Option(help="Seconds a request costs however short; default: from the one-token prompts."),
        ] = None,
        interp: Annotated[str, typer.Option(help="Between profiled prompts: linear, helm or affine.")] = "linear",
        prompt: Annotated[
            int | None, typer.Option("--prompt", help="Price a request of this many prompt tokens")
        ] = None,
        gen: Annotated[int, typer.Option("--gen", help="and this many output tokens.")] = 128,
        json: Json = False,
    ) -> None:
        """Fit T = F(p) + (o - 1) g + h to the fastest trial of every pair, beside the mean of all trials."""
        import numpy as np

        from trimtab.measure.idealized import denoise as fit
        from trimtab.measure.idealized import discrepancy, fit_runtime, read_log
        from trimtab.ui.output import print_json, print_table
        from trimtab.units import format_seconds

        samples = read_log(log)
        found, mean = fit(samples, overhead), fit_runtime(samples)
        wait = discrepancy(samples, found, interp)  # type: ignore[arg-type]
        asked = None if prompt is None else found.time_s(prompt, gen, interp)  # type: ignore[arg-type]
        if json:
            waits = {"mean": float(wait.mean()), "p50": float(np.median(wait)), "p90": float(np.quantile(wait, 0.9))}
            request = None if prompt is None else {"prompt_tokens": prompt, "output_tokens": gen, "seconds": asked}
            runtimes = {"denoised": found.to_dict(), "mean": mean.to_dict()}
            return print_json({"schema": 1, **runtimes, "discrepancy_s": waits, "request": request})
        print_table(
            (">prompt tokens", ">F denoised", ">F of the mean, with h"),
            [
                (str(p), format_seconds(a), format_seconds(b))
                for p, a, b in zip(found.prompt_tokens, found.prompt_s, mean.prompt_s, strict=True)
            ],
        )
        if found.token_s is None or mean.token_s is None:
            typer.echo("No request had an output token: F only, g is unknown.")
        else:
            typer.echo(
                f"g {format_seconds(found.token_s)} per further token (mean of all trials: {format_seconds(mean.token_s)}), "
                f"R² {found.r_squared:.4f}; overhead h {format_seconds(found.overhead_s)} per request."
            )
        typer.echo(
            f"Observed minus denoised: mean {format_seconds(float(wait.mean()))}, P90 "
            f"{format_seconds(float(np.quantile(wait, 0.9)))} over {len(samples)} requests."
        )
        if asked is not None:
            typer.echo(f"{prompt} + {gen} tokens: {format_seconds(asked)}.")
        for warning in found.warnings:
            typer.echo(f"Warning: {warning}")
