"""The command line. A verb's module is imported when that verb is asked for, so `--help` stays instant."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from trimtab import __version__
from trimtab.errors import Interrupted, TrimtabError

#: Verb -> one line of help. The module `trimtab.cli.<verb>` registers the command of that name.
VERBS = {
    "demo": "The main job on the built-in model: predict, apply, measure, report.",
    "predict": "Price a model on a machine under a workload, with techniques.",
    "plan": "Search for a plan under limits: machines, layouts, formats, techniques.",
    "fit": "Largest context and batch that fit a machine.",
    "run": "Generate text.",
    "chat": "Talk with a model in the terminal.",
    "serve": "An OpenAI-compatible HTTP server, techniques as model ids.",
    "ui": "The explorer in the browser: verdict, roofline, sweeps, techniques, plans, runs.",
    "measure": "Predicted beside measured, quality included.",
    "eval": "Quality alone: text, needles, or through the cache (kv).",
    "study": "What a model looks like inside: outliers.",
    "prepare": "Resolve every `auto` of a technique and keep what was found.",
    "train": "Learn what a technique needs, or a tiny model from scratch.",
    "convert": "Save a model with techniques on it: safetensors, GGUF, or our own form.",
    "calibrate": "Fit a Stack to this machine.",
    "validate": "Check predictions against recorded hardware.",
    "fit-stack": "Fit kernel constants to recorded latencies.",
    "import-aic": "Turn a copy of aiconfigurator-core into recorded tables.",
    "idealize": "Idealized runtime of a model, predicted or measured from a handful of timings.",
    "denoise": "Idealized runtime of an endpoint from a log of its timings.",
    "papers": "The ninety papers.",
    "techniques": "The techniques and their parameters.",
    "machines": "The machines and where their numbers come from.",
    "models": "The models whose shapes ship with Trimtab.",
    "verify": "Re-check the claims of a paper, here and now.",
}


class LazyGroup(TyperGroup):
    """A group that knows its verbs by name and imports one only to run it or to show its help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Verbs in the order of the house."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the verb's module and return its command."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"trimtab.cli.{cmd_name.replace('-', '_')}")
        app = typer.Typer(add_completion=False)
        module.register(app)
        command = typer.main.get_command(app)
        command = getattr(command, "commands", {}).get(cmd_name, command)  # a verb with verbs of its own is a group
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name the nearest verb when the one asked for does not exist."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from trimtab.errors import unknown

            raise unknown("command", args[0], VERBS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List verbs from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Name a model, a machine and a workload: predict what a technique saves, apply it, measure that it did.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    """Options before the verb."""


def _warning(message: Warning | str, *_: object) -> str:
    """A warning as a sentence, without the line of code it came from."""
    return f"trimtab: {message}\n"


def main() -> None:
    """Run the command line; exit codes 0, 1 failed, 2 user error, 130 interrupted."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.formatwarning = _warning
    try:
        code = typer.main.get_command(app)(standalone_mode=False)
        if code == 130:
            raise Interrupted
        sys.exit(code if isinstance(code, int) else 0)
    except TyperException as error:  # unknown options, missing arguments
        show = getattr(error, "show", None)
        show() if show else print(error, file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort, Interrupted):
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except TrimtabError as error:
        if debug:
            raise
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
