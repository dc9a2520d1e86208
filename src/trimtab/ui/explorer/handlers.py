"""The explorer's endpoints: one route table over a desk and a measurement."""

from __future__ import annotations

import asyncio
import functools
from importlib import resources

from trimtab.errors import SpecError
from trimtab.serve.call import Call
from trimtab.serve.errors import ApiError
from trimtab.serve.front import Answer, HttpFront, Json, Plain
from trimtab.serve.routes import Route
from trimtab.ui.explorer import catalogues
from trimtab.ui.explorer.compare import compat, search
from trimtab.ui.explorer.desk import Desk
from trimtab.ui.explorer.measuring import Measuring
from trimtab.ui.explorer.sweep import sweep
from trimtab.ui.explorer.types import (
    Case,
    CompatReply,
    DeltasReply,
    DeltasRequest,
    ExplainReply,
    ExplainRequest,
    Machines,
    Models,
    Papers,
    PredictReply,
    Progress,
    Runs,
    SearchReply,
    SearchRequest,
    SweepReply,
    SweepRequest,
    Techniques,
)


class Explorer:
    """Handlers and what they share.

    Args:
        desk: prices.
        measuring: the measurement of this server.
    """

    def __init__(self, desk: Desk, measuring: Measuring | None = None) -> None:
        self.desk, self.measuring = desk, measuring or Measuring()

    async def models(self, front: HttpFront, call: Call) -> Answer:
        """Models whose shapes ship."""
        return Json(await asyncio.to_thread(catalogues.models, self.desk.paths))

    async def machines(self, front: HttpFront, call: Call) -> Answer:
        """Machines and stacks."""
        return Json(await asyncio.to_thread(catalogues.machines))

    async def techniques(self, front: HttpFront, call: Call) -> Answer:
        """Techniques with their parameters."""
        return Json(await asyncio.to_thread(catalogues.techniques))

    async def papers(self, front: HttpFront, call: Call) -> Answer:
        """Papers with the claims that are checked."""
        return Json(await asyncio.to_thread(catalogues.papers))

    async def runs(self, front: HttpFront, call: Call) -> Answer:
        """Measurements of this user with the predictions made before them."""
        return Json(await asyncio.to_thread(catalogues.runs))

    async def predict(self, front: HttpFront, call: Call, request: Case) -> Answer:
        """Price a case, with and without its techniques."""
        return Json(await asyncio.to_thread(self.desk.predict, request))

    async def explain(self, front: HttpFront, call: Call, request: ExplainRequest) -> Answer:
        """Where one number comes from."""
        return Json(await asyncio.to_thread(self.desk.explain, request, request.name))

    async def deltas(self, front: HttpFront, call: Call, request: DeltasRequest) -> Answer:
        """What each of several techniques would change."""
        return Json(DeltasReply(rows=await asyncio.to_thread(self.desk.deltas, request, request.candidates)))

    async def sweep(self, front: HttpFront, call: Call, request: SweepRequest) -> Answer:
        """A case over batch and prompt length."""
        return Json(await asyncio.to_thread(sweep, self.desk, request))

    async def search(self, front: HttpFront, call: Call, request: SearchRequest) -> Answer:
        """Plans that no other beats, under limits."""
        return Json(await asyncio.to_thread(search, self.desk, request))

    async def compat(self, front: HttpFront, call: Call, request: Case) -> Answer:
        """The numbers of LLM-Viewer for a case, and what its faults change."""
        return Json(await asyncio.to_thread(compat, self.desk, request))

    async def progress(self, front: HttpFront, call: Call) -> Answer:
        """How far the measurement is."""
        return Json(self.measuring.progress())

    async def measure(self, front: HttpFront, call: Call, request: Case) -> Answer:
        """Measure a case on this machine, in the background."""
        return Json(await self.measuring.start(self.desk, request))

    async def cancel(self, front: HttpFront, call: Call) -> Answer:
        """End the measurement."""
        return Json(await self.measuring.cancel())

    async def page(self, front: HttpFront, call: Call) -> Answer:
        """The page and its assets."""
        name = call.path_params.get("file", "") or "index.html"
        found = assets().get(name)
        if found is None:
            raise ApiError(404, f"The explorer has no file '{name[:200]}'. It starts at /ui/.", code="unknown_url")
        kind = _KINDS[name.rpartition(".")[2]]
        return Plain(found, kind, headers={"cache-control": "no-cache", "x-content-type-options": "nosniff"})


_KINDS = {
    "html": "text/html; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
}


@functools.cache
def assets() -> dict[str, bytes]:
    """Files of the built page by name.

    Raises:
        SpecError: they are missing from the installation.
    """
    folder = resources.files("trimtab.ui") / "web"
    found = {}
    if folder.is_dir():
        found = {item.name: item.read_bytes() for item in folder.iterdir() if item.name.rpartition(".")[2] in _KINDS}
    if "index.html" not in found:
        raise SpecError("The explorer's page is missing from this installation. In a checkout: make web.")
    return found


def routes_of(explorer: Explorer) -> tuple[Route, ...]:
    """The route table."""
    e = explorer

    def get(path: str, handler: object, reply: type) -> Route:
        return Route(method="GET", path=path, handler=handler, reply=reply, engine=False)  # type: ignore[arg-type]

    def post(path: str, handler: object, request: type, reply: type) -> Route:
        return Route(method="POST", path=path, handler=handler, request=request, reply=reply, engine=False)  # type: ignore[arg-type]

    def page(path: str) -> Route:
        return Route(
            method="GET",
            path=path,
            handler=e.page,
            reply=None,
            access="open",
            engine=False,
            listed=False,
            errors=(404,),
        )

    return (
        get("/api/models", e.models, Models),
        get("/api/machines", e.machines, Machines),
        get("/api/techniques", e.techniques, Techniques),
        get("/api/papers", e.papers, Papers),
        get("/api/runs", e.runs, Runs),
        post("/api/predict", e.predict, Case, PredictReply),
        post("/api/explain", e.explain, ExplainRequest, ExplainReply),
        post("/api/deltas", e.deltas, DeltasRequest, DeltasReply),
        post("/api/sweep", e.sweep, SweepRequest, SweepReply),
        post("/api/search", e.search, SearchRequest, SearchReply),
        post("/api/compat", e.compat, Case, CompatReply),
        get("/api/measurement", e.progress, Progress),
        Route(
            method="POST", path="/api/measurement", handler=e.measure, request=Case, reply=Progress, access="admin",
            engine=False, errors=(409,),
        ),
        Route(
            method="DELETE", path="/api/measurement", handler=e.cancel, reply=Progress, access="admin", engine=False
        ),
        page("/ui"),
        page("/ui/{file:path}"),
    )  # fmt: skip
