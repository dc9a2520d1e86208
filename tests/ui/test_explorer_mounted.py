"""The explorer beside a server of models: its endpoints need no engine, keys are asked for, measuring is an admin's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from trimtab.errors import SpecError
from trimtab.serve.app import build_app
from trimtab.serve.config import HttpConfig, ServeConfig
from trimtab.serve.front import Front
from trimtab.serve.http import HttpServer, listen
from trimtab.serve.keys import new_key, read_keys
from trimtab.serve.launch import SubprocessLauncher
from trimtab.ui.explorer.handlers import routes_of
from trimtab.ui.explorer.host import Host, explorer_for

CASE = {"model": "llama-3.1-8b", "machine": "h100"}


@pytest.fixture
def mounted(home: Path) -> Iterator[Callable[..., httpx.Client]]:
    """A front with the explorer's endpoints whose engine has not started, as while a server loads its model."""
    stops: list[Callable[[], None]] = []

    def begin(**settings: Any) -> httpx.Client:
        config = ServeConfig(models=("tiny",), port=0, **settings)
        front = Front(config, SubprocessLauncher(), read_keys(config.api_key_file), lambda _: None)  # type: ignore[arg-type, return-value]
        sock = listen(config.host, 0)
        server = HttpServer(build_app(front, routes_of(explorer_for(config))), config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=60, verify=False)

        def stop() -> None:
            client.close()
            server.should_exit = True
            thread.join(30)
            sock.close()
            assert not thread.is_alive()

        stops.append(stop)
        return client

    yield begin
    for stop in stops:
        stop()


def test_pricing_works_while_no_engine_does(mounted: Any) -> None:
    client = mounted()
    assert client.get("/ui/").status_code == 200
    assert client.post("/api/predict", json=CASE).status_code == 200
    assert client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 503
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/api/predict", "/v1/completions"} <= set(paths) and "/ui" not in paths


def test_keys_are_asked_for_and_only_an_admin_measures(mounted: Any, tmp_path: Path) -> None:
    (user, one), (admin, two) = new_key("user"), new_key("boss")
    (tmp_path / "keys.toml").write_text(f"{one}\n{two}admin = true\n")
    client = mounted(api_key_file=tmp_path / "keys.toml")
    assert client.get("/ui/app.js").status_code == 200  # the page has to load before it can ask for a key
    assert client.post("/api/predict", json=CASE).status_code == 401
    for key, status in ((user, 403), (admin, 400)):  # 400: several devices cannot be measured, key or no key
        headers = {"authorization": f"Bearer {key}"}
        assert client.post("/api/predict", json=CASE, headers=headers).status_code == 200
        assert client.post("/api/measurement", json={**CASE, "tp": 2}, headers=headers).status_code == status
    answer = client.post(
        "/api/predict", json={**CASE, "model": str(tmp_path)}, headers={"authorization": f"Bearer {user}"}
    )
    assert "only models of the catalogue" in answer.json()["error"]["message"]


def test_the_explorer_alone_has_no_models_to_serve(explorer: Any) -> None:
    with explorer.client() as client:
        assert client.get("/v1/models").status_code == 404
        assert set(client.get("/openapi.json").json()["paths"]) >= {"/api/predict", "/openapi.json"}


def test_a_host_beyond_this_machine_needs_keys() -> None:
    with pytest.raises(SpecError, match="no API keys"):
        HttpConfig(host="0.0.0.0")
    assert explorer_for(HttpConfig()).desk.paths
    assert not explorer_for(HttpConfig(host="0.0.0.0", allow_anonymous=True)).desk.paths


def test_a_taken_address_is_said(explorer: Any) -> None:
    with pytest.raises(SpecError, match="Try another --port"):
        asyncio.run(Host(HttpConfig(port=explorer.host.port)).run())
