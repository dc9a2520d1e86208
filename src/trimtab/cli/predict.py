"""``trimtab predict``: price a model on a machine under a workload, with techniques."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def predict(
        model: options.Model,
        on: options.On = None,
        batch: options.Batch = 1,
        prompt: options.Prompt = 512,
        gen: options.Gen = 128,
        technique: options.Techniques = None,
        dtype: options.Dtype = "bfloat16",
        kv_dtype: options.KVDtype = "bfloat16",
        stack: options.Stack = None,
        explain: Annotated[
            str | None, typer.Option("--explain", metavar="NAME", help="Explain one count or figure.")
        ] = None,
        json: options.Json = False,
    ) -> None:
        """Price a model on a machine; nothing is loaded or run."""
        from trimtab.api import make_plan
        from trimtab.predict.predict import predict as price
        from trimtab.spec.workload import Workload

        work = Workload(batch=batch, prompt=prompt, gen=gen)
        report = price(make_plan(model, on, work, technique or (), dtype=dtype, kv_dtype=kv_dtype, stack=stack))
        if explain is not None:
            from trimtab.predict.explain import explain as text

            return typer.echo(text(report, explain))
        if json:
            from trimtab.ui.output import print_json

            return print_json(report.to_dict())
        from trimtab.ui.tables import print_report

        print_report(report)
