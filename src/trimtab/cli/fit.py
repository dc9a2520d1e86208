"""``trimtab fit``: the largest context and batch that fit a machine."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def fit(
        model: options.Model,
        on: options.On = None,
        memory: Annotated[
            str | None,
            typer.Option("--memory", metavar="SIZE", help="Capacity, for example 8GiB; default: the machine's."),
        ] = None,
        context: Annotated[
            int | None, typer.Option("--context", help="Find the largest batch at this many tokens.")
        ] = None,
        batch: options.Batch = 1,
        gen: options.Gen = 128,
        technique: options.Techniques = None,
        dtype: options.Dtype = "bfloat16",
        kv_dtype: options.KVDtype = "bfloat16",
        stack: options.Stack = None,
        tp: options.Tp = 1,
        pp: options.Pp = 1,
        dp: options.Dp = 1,
        ep: options.Ep = 1,
        json: options.Json = False,
    ) -> None:
        """Largest context for a batch, or largest batch for a context, with the sum of bytes."""
        from trimtab.api import make_plan
        from trimtab.errors import SpecError
        from trimtab.predict.fit import fit as solve
        from trimtab.spec.parallel import Parallel
        from trimtab.spec.workload import Workload
        from trimtab.units import parse_bytes

        if context is not None and context < 2:
            raise SpecError(
                f"--context {context} is not possible. Allowed: 2 or more (a prompt token and a generated one)."
            )
        plan = make_plan(
            model, on, Workload(batch=batch, gen=gen), technique or (), dtype=dtype, kv_dtype=kv_dtype, stack=stack,
            parallel=Parallel(tp=tp, pp=pp, dp=dp, ep=ep),
        )  # fmt: skip
        result = solve(plan, parse_bytes(memory) if memory else None, context)
        if json:
            from trimtab.ui.output import print_json

            return print_json(result.to_dict())
        from trimtab.ui.tables import print_fit

        print_fit(result)
