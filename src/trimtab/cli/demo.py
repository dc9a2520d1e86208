"""``trimtab demo``: the main job on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL = "smollm2-135m"
TECHNIQUES = ("rtn:bits=4,group=32", "cats:sparsity=0.5", "gemfilter:topk=256", "streaming-llm:sink=4,recent=508")
ELSEWHERE = ("a100", "h100", "4090")


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def demo(
        prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 1536,
        gen: Annotated[int, typer.Option(help="Tokens generated.")] = 64,
        rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 2,
        report: Annotated[Path, typer.Option(help="HTML report to write.")] = Path("trimtab-report.html"),
    ) -> None:
        """Predict, apply and measure four techniques on SmolLM2-135M, and write a report."""
        import sys

        from trimtab.runtime.weights.load import built_in_file

        built_in_file()  # a missing model package is said before anything runs
        import torch

        from trimtab.api import load, predict
        from trimtab.measure.measure import compare, ensure_calibrated, prepare
        from trimtab.spec.workload import Workload
        from trimtab.techniques.plan import make_plan
        from trimtab.ui.comparison import Compared, table_cells
        from trimtab.ui.html import write_report
        from trimtab.ui.output import print_table
        from trimtab.ui.progress import bars
        from trimtab.units import format_bytes, format_seconds

        workload = Workload(prompt=prompt, gen=gen)
        dtypes: dict[str, Any] = {"dtype": "float32", "kv_dtype": "float32"}
        with bars() as progress:
            ensure_calibrated(progress)
            model = load(MODEL, dtype="float32")
            plans = [make_plan(MODEL, "this", workload, [technique], **dtypes) for technique in TECHNIQUES]
            arms = []
            for plan in progress("apply techniques", plans):
                base, variant = prepare(plan, model, progress=progress)
                arms += [variant] if arms else [base, variant]
            found = compare(arms, rounds=rounds, progress=progress)
        elsewhere = [predict(make_plan(MODEL, machine, workload, **dtypes)) for machine in ELSEWHERE]
        rows = [Compared(label=each.arm.label, predicted=each.predicted, measured=each.measured) for each in found]
        machine, stack = arms[0].plan.machine, arms[0].plan.stack
        facts = [
            f"SmolLM2-135M-Instruct, float32 weights, activations and cache (the file it comes from is itself Q4_1: "
            f"its weights are 4-bit values, held here in 32 bits). Prompt {prompt}, {gen} generated, batch 1.",
            f"Measured on {machine.name}, torch {torch.__version__}: medians of {rounds} interleaved rounds. "
            f"Predicted before from `trimtab calibrate` (band P10 {stack.band[0]:.2f}, P90 {stack.band[1]:.2f}).",
            "KL and perplexity: the tokens that follow the prompt in held-out text, fed one by one through each "
            "technique's own cache; thresholds come from another half of the text.",
        ]
        band = max(stack.band[1] - 1, 1 - stack.band[0], 0.25)
        write_report(
            report, title="Trimtab: predicted beside measured", facts=facts, rows=rows, machine=machine,
            elsewhere=elsewhere, band=band,
        )  # fmt: skip
        print_table(
            ("elsewhere (predicted)", ">TTFT", ">TPOT", ">memory"),
            [
                (
                    str(each.plan["machine"]),
                    format_seconds(each.figures["ttft_s"].value or 0.0),
                    format_seconds(each.figures["tpot_s"].value or 0.0),
                    format_bytes(each.counts["peak_bytes"]),
                )
                for each in elsewhere
            ],
        )
        for fact in facts:
            typer.echo(fact)
        print_table(*table_cells(rows))
        for note in dict.fromkeys(note for each in found for note in each.measured.notes):
            typer.echo(f"Note: {note}")
        print(f"Report: {report}", file=sys.stderr)
