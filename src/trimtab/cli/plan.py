"""``trimtab plan``: search machines, numbers of devices, layouts, formats and techniques for a plan that keeps limits."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def plan(
        model: options.Model,
        on: Annotated[
            list[str] | None,
            typer.Option("--on", metavar="MACHINE", help="Machine to try; repeatable. Default: a100 h100 h200 l40s."),
        ] = None,
        counts: Annotated[
            str, typer.Option(help="Numbers of devices, each cut in every way into tp x pp.")
        ] = "1|2|4|8",
        prompt: options.Prompt = 512,
        gen: options.Gen = 128,
        concurrency: Annotated[int, typer.Option(help="Most requests at a time.")] = 256,
        dtype: Annotated[
            list[str] | None, typer.Option("--dtype", help="Weights to try; repeatable. Default: bfloat16, fp8.")
        ] = None,
        kv_dtype: Annotated[
            list[str] | None, typer.Option("--kv-dtype", help="Cache to try; repeatable. Default: bfloat16, fp8.")
        ] = None,
        technique: Annotated[
            list[str] | None,
            typer.Option(
                "-t", "--technique", metavar="SPEC", help="Technique to try, or several as spec+spec; repeatable."
            ),
        ] = None,
        ttft: Annotated[float | None, typer.Option(help="Most seconds to the first token.")] = None,
        tpot: Annotated[float | None, typer.Option(help="Most seconds per further token.")] = None,
        tokens_per_s: Annotated[float | None, typer.Option(help="Least tokens per second of all requests.")] = None,
        usd_per_h: Annotated[
            float | None, typer.Option("--max-usd-per-h", help="Most dollars per hour of all devices.")
        ] = None,
        usd_per_mtoken: Annotated[
            float | None, typer.Option("--max-usd-per-mtoken", help="Most dollars per million tokens.")
        ] = None,
        memory: Annotated[
            str | None, typer.Option(metavar="SIZE", help="Most memory of one device, for example 40GiB.")
        ] = None,
        stack: options.Stack = None,
        emit: Annotated[
            str | None, typer.Option(help="Print the command that starts the winner: vllm or sglang.")
        ] = None,
        losers: Annotated[int, typer.Option(help="Losers shown, with the reason.")] = 12,
        json: options.Json = False,
    ) -> None:
        """Find the plans no other plan beats in TTFT, TPOT and price, under limits."""
        from trimtab.api import find_plans
        from trimtab.errors import SpecError, unknown
        from trimtab.predict.emit import ENGINES, command_line
        from trimtab.predict.search import Limits
        from trimtab.ui.plans import found_to_dict, print_found
        from trimtab.units import parse_bytes

        if concurrency < 1:
            raise SpecError(f"concurrency={concurrency} is not possible. Allowed: a whole number of 1 or more.")
        if emit is not None and emit not in ENGINES:
            raise unknown("engine", emit, ENGINES)
        limits = Limits(
            ttft_s=ttft, tpot_s=tpot, tokens_per_s=tokens_per_s, usd_per_h=usd_per_h, usd_per_million_tokens=usd_per_mtoken,
            memory_bytes=parse_bytes(memory) if memory else None,
        )  # fmt: skip
        found = find_plans(
            model, on or ("a100", "h100", "h200", "l40s"), prompt=prompt, gen=gen, counts=options.numbers("counts", counts),
            concurrency=concurrency, dtypes=dtype or ("bfloat16", "fp8"), kv_dtypes=kv_dtype or ("bfloat16", "fp8"),
            techniques=technique or (), limits=limits, stack=stack,
        )  # fmt: skip
        command = command_line(found.best[0], emit, prompt + gen) if emit and found.best else ""
        if json:
            from trimtab.ui.output import print_json

            print_json(found_to_dict(found, command))
        else:
            print_found(found, losers)
            if command:
                typer.echo(command)
        if not found.best:
            raise typer.Exit(1)
