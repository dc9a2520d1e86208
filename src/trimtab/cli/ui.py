"""``trimtab ui``: the explorer in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def ui(
        host: Annotated[
            str, typer.Option(help="Address to listen on; beyond this machine only with keys.")
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8090,
        open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
        api_key_file: Annotated[
            Path | None, typer.Option(help="TOML file of hashed API keys; see trimtab serve --new-key.")
        ] = None,
        allow_anonymous: Annotated[
            bool, typer.Option("--allow-anonymous", help="Listen beyond this machine without keys.")
        ] = False,
    ) -> None:
        """Explore models, machines and techniques in the browser, until Ctrl-C.

        The page is at /ui/, its JSON under /api/, described by /openapi.json. Nothing leaves this machine.
        """
        from trimtab.errors import MissingDependency

        try:
            from trimtab.serve.config import HttpConfig
            from trimtab.ui.explorer.host import serve_explorer
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("trimtab"):
                raise
            raise MissingDependency(f"ui needs {error.name}. Install it: pip install 'trimtab[serve]'") from None

        def opened(url: str) -> None:
            if open_browser:
                import webbrowser

                webbrowser.open(url)

        config = HttpConfig(host=host, port=port, api_key_file=api_key_file, allow_anonymous=allow_anonymous)
        raise typer.Exit(serve_explorer(config, opened))
