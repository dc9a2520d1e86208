"""``trimtab predict``: price a model on a machine under a workload, with techniques; or a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import options

if TYPE_CHECKING:
    from trimtab.spec.report import Report

Option = typer.Option


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
        concurrency: Annotated[
            int | None, Option(help="A serving point: this many requests at any time, instead of one batch.")
        ] = None,
        tp: options.Tp = 1,
        pp: options.Pp = 1,
        dp: options.Dp = 1,
        ep: options.Ep = 1,
        skew: Annotated[
            float, Option(help="How unevenly tokens choose experts: the r-th most popular is chosen as r^-skew.")
        ] = 0.0,
        usd_per_h: Annotated[float | None, Option("--usd-per-h", help="Price of one device.")] = None,
        phase: Annotated[str, Option(help="serve, or train for one training step.")] = "serve",
        gpus: Annotated[int, Option(help="train: devices; what tp and pp leave is data parallel.")] = 8,
        micro_batch: Annotated[int, Option(help="train: sequences a replica runs at once.")] = 1,
        global_batch: Annotated[int | None, Option(help="train: sequences of one step.")] = None,
        seq_len: Annotated[int, Option(help="train: tokens per sequence.")] = 2048,
        zero: Annotated[int, Option(help="train: ZeRO stage, 0 to 3 (3 = FSDP).")] = 0,
        schedule: Annotated[str, Option(help="train: 1f1b, gpipe or interleaved.")] = "1f1b",
        chunks: Annotated[int, Option(help="train: model parts per device of the interleaved schedule.")] = 1,
        recompute: Annotated[str, Option(help="train: none, selective or full.")] = "none",
        sequence_parallel: Annotated[
            bool, Option("--sequence-parallel", help="train: norms split over tp too.")
        ] = False,
        flash: Annotated[bool, Option("--flash/--no-flash", help="train: attention in tiles.")] = True,
        compat: Annotated[
            str | None,
            Option(help="llm-viewer: that tool's numbers; with --explain faults what each of its faults changes."),
        ] = None,
        explain: Annotated[str | None, Option("--explain", metavar="NAME", help="Explain one count or figure.")] = None,
        json: options.Json = False,
    ) -> None:
        """Price a model on a machine; nothing is loaded or run."""
        from dataclasses import replace

        from trimtab.errors import SpecError, unknown

        if phase not in ("serve", "train"):
            raise unknown("phase", phase, ("serve", "train"))
        if concurrency is not None and concurrency < 1:
            raise SpecError(f"concurrency={concurrency} is not possible. Allowed: a whole number of 1 or more.")
        if compat is not None:
            return _compat(compat, model, on, batch, prompt, gen, explain, json)
        plan = None
        if phase == "train":
            alien = {"-t": technique, "--concurrency": concurrency, "--dp": dp > 1, "--ep": ep > 1, "--skew": skew}
            given = [option for option, value in alien.items() if value]
            if given:
                raise SpecError(
                    f"{', '.join(given)} says nothing about a training step. Leave it out with --phase train."
                )
            report = _training(
                model, on, stack, gpus=gpus, tp=tp, pp=pp, micro_batch=micro_batch, global_batch=global_batch,
                seq_len=seq_len, zero=zero, schedule=schedule, chunks=chunks, recompute=recompute,
                sequence_parallel=sequence_parallel, flash=flash, dtype=dtype,
            )  # fmt: skip
        else:
            from trimtab.predict.predict import predict as price
            from trimtab.spec.parallel import Parallel
            from trimtab.spec.workload import Workload
            from trimtab.techniques.plan import make_plan

            work = Workload(
                batch=batch if concurrency is None else concurrency, prompt=prompt, gen=gen, continuous=concurrency is not None, skew=skew
            )  # fmt: skip
            plan = make_plan(
                model, on, work, technique or (), dtype=dtype, kv_dtype=kv_dtype, stack=stack,
                parallel=Parallel(tp=tp, pp=pp, dp=dp, ep=ep),
            )  # fmt: skip
            if usd_per_h is not None:
                plan = replace(plan, machine=plan.machine.priced(usd_per_h))
            report = price(plan)
        if explain is not None:
            from trimtab.predict.explain import explain as text

            return typer.echo(text(report, explain, plan))
        if json:
            from trimtab.ui.output import print_json

            return print_json(report.to_dict())
        from trimtab.ui.tables import print_report, print_training

        print_report(report) if phase == "serve" else print_training(report)


def _training(model: str, on: str | None, stack: str | None, *, gpus: int, dtype: str, **layout: Any) -> Report:
    """Price one training step."""
    from trimtab.predict.training.step import predict_training
    from trimtab.spec.configs import load_spec
    from trimtab.spec.formats import weights_name
    from trimtab.spec.machine import load_machine, load_stack
    from trimtab.spec.training import TRAINING_STACKS, layout_on, load_training_stack

    machine = load_machine(on or "a100")
    chosen = None
    if stack is not None:
        chosen = load_training_stack(stack, machine) if stack in TRAINING_STACKS else load_stack(stack).on(machine)
    training = layout_on(gpus, dtype=weights_name(dtype), **layout)
    return predict_training(load_spec(model), training, machine, chosen, gpus=gpus)


def _compat(
    tool: str, model: str, on: str | None, batch: int, prompt: int, gen: int, explain: str | None, json: bool
) -> None:
    """The numbers of another tool, and what its faults change."""
    from trimtab.errors import SpecError, unknown
    from trimtab.predict.compat import Case
    from trimtab.spec.configs import load_spec
    from trimtab.spec.machine import load_machine
    from trimtab.ui import compat

    if tool != "llm-viewer":
        raise unknown("tool", tool, ("llm-viewer",))
    if explain not in (None, "faults"):
        raise SpecError(f"--compat {tool} explains its faults alone. Write --explain faults.")
    spec, machine = load_spec(model).with_dtype("float16"), load_machine(on or "a100")
    case = Case(batch=batch, seqlen=prompt)
    if json:
        from trimtab.ui.output import print_json

        return print_json(compat.compat_json(spec, machine, case, gen))
    compat.print_faults(spec, machine, case, gen) if explain else compat.print_viewer(spec, machine, case)
