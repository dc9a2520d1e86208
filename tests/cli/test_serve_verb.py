"""``trimtab serve`` on the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

pytest.importorskip("uvicorn")

from trimtab.cli.main import app
from trimtab.errors import MissingDependency, SpecError


def test_help_names_every_flag_of_the_settings() -> None:
    import dataclasses

    from trimtab.serve.config import ServeConfig, _flag

    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).stdout
    not_flags = {"models", "engine_s", "start_s"}
    for field in dataclasses.fields(ServeConfig):
        if field.name not in not_flags:
            assert f"--{_flag(field.name)}" in text


def test_defaults_are_those_of_the_settings() -> None:
    import dataclasses
    import inspect

    import typer

    from trimtab.cli import serve
    from trimtab.serve.config import ServeConfig
    from trimtab.units import parse_bytes

    group = typer.Typer()
    serve.register(group)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(group.registered_commands[0].callback).parameters.items()
    }  # type: ignore[arg-type]
    for field in dataclasses.fields(ServeConfig):
        name = (
            "grace"
            if field.name == "grace_s"
            else field.name[:-2] + "_seconds"
            if field.name.endswith("_s")
            else field.name
        )
        if name in defaults and field.name != "models":
            given = (
                parse_bytes(defaults[name])
                if field.name in ("max_body", "max_headers", "stream_buffer", "kv_bytes")
                else defaults[name]
            )
            assert given == field.default, name


def test_a_new_key_is_printed_once() -> None:
    found = CliRunner().invoke(app, ["serve", "--new-key", "ci"])
    assert found.exit_code == 0
    assert found.stdout.startswith('[[keys]]\nname = "ci"\nhash = "sha256:')
    assert "tt-" not in found.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "No model"), (["m", "--host", "0.0.0.0"], "lets other machines in"), (["smollm2-135m@nonsense"], "nonsense"),
        (["smollm2-135m@kivi:bits=99"], "bits"), (["smollm2-135m@"], "no model id"), (["m", "--max-queue", "0"], "--max-queue"),
        (["m", "--api-key-file", "/nowhere"], "/nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_loaded(arguments: list[str], words: str) -> None:
    found = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(found.exception, SpecError)
    assert words in str(found.exception)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("trimtab.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "msgspec", None)
    found = CliRunner().invoke(app, ["serve", "smollm2-135m"])
    assert isinstance(found.exception, MissingDependency)
    assert "pip install 'trimtab[serve]'" in str(found.exception)


def test_the_http_process_imports_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import trimtab.serve.lifecycle, trimtab.serve.child, trimtab.cli.serve; "
        "assert not {'pydantic', 'transformers', 'llguidance'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
