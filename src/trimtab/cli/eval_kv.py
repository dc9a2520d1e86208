"""``trimtab eval kv`` and ``trimtab eval life-cycle``: quality through the cache, and where methods act on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from trimtab.cli.options import Json, Model, numbers

if TYPE_CHECKING:
    from trimtab.measure.kv.harness import Evaluation, Row
    from trimtab.measure.kv.stats import Interval


def register(group: typer.Typer) -> None:
    """Add both commands to the group of `eval`."""

    @group.command("kv")
    def kv(
        model: Model,
        methods: Annotated[
            str, typer.Option(help="Spec strings apart by ;. The full cache always runs beside them.")
        ] = "full;streaming-llm:sink=4,recent=252",
        tasks: Annotated[str | None, typer.Option(help="Names apart by commas; `all`: every one built in.")] = None,
        mode: Annotated[str | None, typer.Option(help="multi-turn, multi-request, or both apart by a comma.")] = None,
        len: Annotated[str | None, typer.Option("--len", help="Most tokens of a context, such as 512,1024.")] = None,
        turns: Annotated[int | None, typer.Option(help="Questions about a context, 1..10.")] = None,
        sessions: Annotated[int | None, typer.Option(help="Dialogues of each task and length.")] = None,
        history: Annotated[str, typer.Option(help="Earlier answers in multi-turn mode: golden or own.")] = "golden",
        data: Annotated[Path | None, typer.Option(help="A jsonl file of SCBench's form.")] = None,
        text: Annotated[str, typer.Option(help="Text for perplexity and KL: a file, topics, or none.")] = "topics",
        tier: Annotated[
            str, typer.Option(help="smoke (a minute) or full (20 minutes); other options override it.")
        ] = "smoke",
        seed: Annotated[int, typer.Option(help="Of dialogues and intervals.")] = 0,
        dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
        engine: Annotated[
            str,
            typer.Option(help="torch, native, or auto: native for the methods it can run; compare times within one."),
        ] = "torch",
        calibration: Annotated[Path | None, typer.Option(help="Text methods calibrate on; default: built-in.")] = None,
        json: Json = False,
    ) -> None:
        """One context, several questions: accuracy, answer nll, bytes and time of cache methods, the full cache beside."""
        import dataclasses

        from trimtab.errors import unknown
        from trimtab.measure.kv.engines import ENGINES, Engine
        from trimtab.measure.kv.harness import evaluate, open_methods
        from trimtab.measure.kv.request import TIERS, check, parse_methods
        from trimtab.measure.kv.tasks import TASKS
        from trimtab.measure.texts import read_text
        from trimtab.spec.configs import load_spec
        from trimtab.techniques.apply import default_materials, load
        from trimtab.techniques.materials import text_materials
        from trimtab.ui.output import print_json
        from trimtab.ui.progress import bars

        if tier not in TIERS:
            raise unknown("tier", tier, TIERS)
        if engine not in ENGINES:
            raise unknown("engine", engine, ENGINES)
        asked: dict[str, object] = {
            "methods": parse_methods(methods),
            "seed": seed,
            "history": history,
            "data": data,
            "tasks": () if data and not tasks else _names(tasks, [name for name, task in TASKS.items() if task.build]),
            "modes": _names(mode.replace("|", ",") if mode else None, ["multi-turn", "multi-request"]),
            "lengths": tuple(numbers("len", len)) if len else None,
            "turns": turns,
            "sessions": sessions,
            "windows": 0 if text == "none" else None,
        }
        request = dataclasses.replace(
            TIERS[tier], **{name: value for name, value in asked.items() if value is not None}
        )
        check(request, load_spec(model))
        held_out = "" if text == "none" else read_text(text)
        base = load(model, dtype=dtype)
        with bars() as progress:
            materials = (text_materials(calibration) if calibration else default_materials(base)).for_model(
                base, progress
            )
            runners, stages = open_methods(base, request.methods, materials, cast(Engine, engine))
            found = evaluate(runners, base.tokenizer, request, text=held_out, stages=stages, progress=progress)
        if json:
            return print_json({"schema": 1, "model": model, "tier": tier, "seed": seed, **found.to_dict()})
        _print(found)

    @group.command("life-cycle")
    def life_cycle(
        methods: Annotated[str | None, typer.Option(help="Spec strings apart by ;; default: all there are.")] = None,
        probe: Annotated[str, typer.Option(help="Model they are priced on.")] = "llama-3.1-8b",
        json: Json = False,
    ) -> None:
        """Stage, cache size, prefill and decode of each method: n prompt tokens, m generated, k a constant."""
        import dataclasses

        from trimtab.measure.kv.request import parse_methods
        from trimtab.measure.kv.taxonomy import PAPER, absent, table
        from trimtab.ui.output import print_json, print_table

        rows = table(parse_methods(methods) if methods else (), probe)
        if json:
            return print_json([dataclasses.asdict(row) for row in rows])
        print_table(
            ("method", "stage", "how", "cache", "prefill", "decode", ">bytes"),
            [(r.spec, r.stage, r.kind, r.kv_size, r.prefill, r.decode, f"{r.kv_ratio:.1%}") for r in rows]
            + [
                (name, PAPER[name][0], "not built here: the paper's row", *PAPER[name][1:], "")
                for name in absent()
                if not methods
            ],
        )


def _names(text: str | None, every: list[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(every) if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())


def _print(found: Evaluation) -> None:
    from trimtab.ui.output import print_table

    def row(r: Row) -> tuple[str, ...]:
        if r.accuracy is None or r.nll_nats is None or r.nll_difference is None:
            return (r.method, r.task, "", r.mode, r.status, *[""] * 7)
        return (
            r.method,
            r.task,
            str(r.tokens),
            r.mode,
            f"{r.accuracy.mean:.0%} ({r.full_accuracy:.0%})",
            " ".join(f"{value:.0%}" for value in r.accuracy_by_turn),
            f"{r.nll_nats.mean:.2f} ({r.full_nll_nats:.2f})",
            "" if r.method == "full" else _signed(r.nll_difference),
            f"{r.held_bytes / max(r.full_held_bytes, 1):.0%}",
            f"{r.peak_bytes / 2**20:.1f}",
            f"{r.prefill_s:.2f}",
            f"{1e3 * r.decode_s:.0f}",
        )

    columns = (
        "method", "task", ">len", "mode", ">right (full)", "by turn", ">nll (full), nats", ">nll - full", ">cache",
        ">peak MiB", ">prefill s", ">step ms",
    )  # fmt: skip
    if found.rows:
        print_table(columns, [row(r) for r in found.rows])
    for task in dict.fromkeys(r.task for r in found.rows if r.status == "beyond-model"):
        typer.echo(
            f"{task}: the full cache is right less than 40 % of the time somewhere; judge methods there by the nll."
        )
    for r in {r.task: r for r in found.rows if r.status == "needs-data"}.values():
        typer.echo(f"{r.task}: {r.note}")
    if found.text:
        print_table(
            ("text through the cache", ">perplexity (full)", ">nll - full", ">KL, nats", ">top-1"),
            [
                (
                    t.method,
                    f"{t.ppl:.2f} ({t.full_ppl:.2f})",
                    _signed(t.nll_difference),
                    f"{t.kl_nats.mean:.4f}",
                    f"{t.top1_agreement.mean:.1%}",
                )
                for t in found.text
            ],
        )


def _signed(found: Interval) -> str:
    if found.low == found.high:  # one dialogue or window has no spread
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
