"""``trimtab study``: what a model looks like inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json, Model


def register(app: typer.Typer) -> None:
    """Add the verb and its kinds."""
    group = typer.Typer(help="What a model looks like inside.", no_args_is_help=True)

    @group.callback()
    def kinds() -> None:
        """What a model looks like inside."""

    @group.command("outliers")
    def outliers(
        model: Model,
        text: Annotated[str, typer.Option(help="Text file, or topics: the built-in held-out text.")] = "topics",
        threshold: Annotated[float, typer.Option(help="Magnitude of an outlier.")] = 6.0,
        windows: Annotated[int, typer.Option(help="Most windows, spread over the text.")] = 8,
        tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        out: Annotated[Path | None, typer.Option(help="Write the columns for llm-int8:outliers=static:FILE.")] = None,
        json: Json = False,
    ) -> None:
        """Feature dimensions that hold outliers, their layers, positions and values, and what products in int8 leave out."""
        import trimtab
        from trimtab.measure.outliers import outlier_report
        from trimtab.measure.quality import windows as cut
        from trimtab.measure.texts import read_text
        from trimtab.techniques.linear._outliers import save
        from trimtab.ui.output import print_json, print_table
        from trimtab.ui.progress import bars

        source = read_text(text)
        loaded = trimtab.load(model, dtype=dtype)
        pieces = cut(loaded.tokenizer.encode(source), tokens, windows)
        with bars() as progress:
            found = outlier_report(loaded.variant, pieces, threshold, progress)
        if out:
            save(out, loaded.spec, threshold, found.columns)
        if json:
            return print_json({"schema": 1, "model": model, "text": text, **found.to_dict()})
        typer.echo(
            f"{model} on {text}: {found.windows} windows of {tokens}; outliers from {threshold:g} on; "
            f"{found.in_int8:.2%} of the multiply-adds in int8"
        )
        print_table(
            ("block input", ">dimension", ">layers", ">positions", ">25 %", ">median", ">75 %"),
            [
                (d.block, str(d.dimension), f"{d.layers:.0%}", f"{d.positions:.1%}", *(f"{q:.1f}" for q in d.quartiles))
                for d in found.dimensions
            ],
            title=f"{len(found.dimensions)} emergent outliers",
        )
        print_table(
            ("matrix", ">inputs", ">outlier columns", ">share", ">largest"),
            [(m.path, str(m.inputs), f"{m.columns:.1f}", f"{m.share:.2%}", f"{m.largest:.1f}") for m in found.matrices],
        )

    app.add_typer(group, name="study")
