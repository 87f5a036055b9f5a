"""The FastAPI side of the server: health, metadata, metrics, administration, OpenAPI.

The two classification routes are declared here for the OpenAPI page; `serve.http.App` answers them.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import Awaitable, Callable
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from serve import openapi, protocol
from serve.errors import Failure, UserError
from serve.metrics import CONTENT_TYPE
from serve.prompt import parse_prompt
from serve.protocol import RequestError
from serve.task import Task

if TYPE_CHECKING:
    from serve.http import App

INTERNAL = "internal error; the server's log says why"
# What the page of the routes may do: ask this server, and nobody else.
_PAGE = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'",
}
_ADMIN_BODY = 64 * 2**20  # bytes; the prompt of mode deep takes some megabytes in base64


def version() -> str:
    """The installed version of the project, or `dev` in a source tree."""
    try:
        return metadata.version("metapt")
    except metadata.PackageNotFoundError:
        return "dev"


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(protocol.dump(value), status, headers, media_type="application/json")


def make_routes(app: App, admin_token: str | None) -> FastAPI:
    """Every route; those that change tasks only with an admin token."""
    api = FastAPI(
        title="MetaPT server",
        version=version(),
        description=openapi.DESCRIPTION,
        # Texts of users are in errors otherwise, and the routes check their input themselves.
        debug=False,
        # The framework's own pages load their programs from the internet; ours is `docs.html`.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )

    async def on_error(request: Request, error: Exception) -> Response:
        """JSON for what the routes raise; `App` logs what is neither of the first two."""
        if isinstance(error, HTTPException):
            headers = dict(error.headers) if error.headers else {}
            detail, path = str(error.detail), request.url.path[:100]
            if error.status_code == 405:
                detail = f"{path} takes {headers.get('Allow', 'another method')}"
            elif detail == "Not Found":  # the framework's own word for a path that no route has
                detail = f"nothing is at {path}: /docs lists the routes"
            return _json({"error": detail}, error.status_code, headers)
        if isinstance(error, RequestError):
            return _json({"error": str(error)}, error.status)
        return _json({"error": INTERNAL}, 500)

    for kind in (HTTPException, RequestError, Exception):
        api.add_exception_handler(kind, on_error)
    _health(api, app)
    _models(api, app, bool(admin_token))
    if admin_token:
        _administration(api, app, admin_token)
    return api


def _health(api: FastAPI, app: App) -> None:
    @api.get("/v2/health/live", tags=["health"], summary="Whether the process runs")
    async def live() -> Response:
        return _json({"live": True})

    @api.get("/v2/health/ready", tags=["health"], summary="Whether requests are answered",
             responses=openapi.errors(503))  # fmt: skip
    async def ready() -> Response:
        if app.ready():
            return _json({"ready": True})
        return _json({"error": "not ready: starting, shutting down or stuck"}, 503)

    for path, answer in (("/v2/health/live", live), ("/v2/health/ready", ready)):
        # Some load balancers ask with HEAD.
        api.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    @api.get("/metrics", tags=["health"], summary="Counters in Prometheus' text format")
    async def metrics() -> Response:
        return Response(app.metrics.page(), media_type=CONTENT_TYPE)


def _models(api: FastAPI, app: App, admin: bool) -> None:
    def found(name: str) -> Any:
        if name not in app.classifier.tasks:
            raise RequestError(404, f"no task '{name[:80]}': GET / lists the tasks")
        return app.classifier.tasks[name]

    @api.get("/", tags=["tasks"], summary="The tasks and their labels")
    async def index() -> Response:
        tasks = {name: task.labels for name, task in app.classifier.tasks.items()}
        return _json({"tasks": tasks, "documentation": "/docs"})

    page = resources.files("serve").joinpath("docs.html").read_bytes()

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=_PAGE)

    @api.get("/v2", tags=["protocol v2"], summary="The server")
    async def server() -> Response:
        extensions = ["model_repository"] if admin else []
        return _json({"name": "metapt", "version": version(), "extensions": extensions})

    @api.get("/v2/models/{task}", tags=["protocol v2"], summary="A task",
             responses=openapi.errors(404))  # fmt: skip
    async def model(task: str) -> Response:
        return _json(protocol.metadata(found(task)))

    @api.get("/v2/models/{task}/ready", tags=["protocol v2"], summary="Whether a task is served",
             responses=openapi.errors(404, 503))  # fmt: skip
    async def model_ready(task: str) -> Response:
        found(task)
        if app.ready():
            return _json({"name": task, "ready": True})
        return _json({"error": "not ready: starting, shutting down or stuck"}, 503)

    async def infer(request: Request) -> Response:
        return _Direct(app, request)

    for path, summary, extra in (
        ("/classify", "Classify texts", openapi.CLASSIFY),
        ("/v2/models/{task}/infer", "Classify texts of one task", openapi.INFER),
    ):
        api.add_api_route(
            path, infer, methods=["POST"], summary=summary, openapi_extra=extra,
            tags=["classification"], operation_id=summary.lower().replace(" ", "_"),
            responses=openapi.errors(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
        )  # fmt: skip


class _Direct(Response):
    """Hands a request on to the handler on the bare interface, should one come this way."""

    def __init__(self, app: App, request: Request) -> None:
        super().__init__()
        self._app, self._request = app, request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app.infer(scope, receive, send)


def _administration(api: FastAPI, app: App, token: str) -> None:
    """The model repository extension: which tasks there are, load, unload."""
    secret = token.encode("utf-8", "surrogateescape")  # as it stood in the environment

    async def admitted(request: Request) -> bytes:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Bytes: those of a header were read as latin-1, whatever the client meant by them.
        right = hmac.compare_digest(given.encode("latin-1").strip(), secret)
        if scheme.lower() != "bearer" or not right:
            raise HTTPException(
                401, "send 'Authorization: Bearer TOKEN' with the server's admin token",
                {"www-authenticate": "Bearer"},
            )  # fmt: skip
        return await app.read_body(request.scope, request.receive, _ADMIN_BODY)

    async def aside(work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(app.admin, work)

    # For the OpenAPI page only: `admitted` looks at the token.
    scheme = HTTPBearer(scheme_name="admin", auto_error=False)

    def route(path: str, summary: str, extra: dict[str, Any]) -> Callable[[Any], Any]:
        def register(handler: Callable[..., Awaitable[Response]]) -> None:
            api.add_api_route(
                path, handler, methods=["POST"], summary=summary, tags=["administration"],
                openapi_extra=extra, dependencies=[Security(scheme)],
                responses=openapi.errors(400, 401, 404, 408, 413, 415, 500, 503),
            )  # fmt: skip

        return register

    @route("/v2/repository/index", "Tasks that are served", openapi.INDEX)
    async def index(request: Request) -> Response:
        await admitted(request)
        return _json(
            [
                {"name": name, "version": protocol.version_of(task), "state": "READY", "reason": ""}
                for name, task in app.classifier.tasks.items()
            ]
        )

    @route("/v2/repository/models/{task}/load", "Serve a task, or its new version", openapi.LOAD)
    async def load(task: str, request: Request) -> Response:
        body = await admitted(request)
        added = await aside(lambda: _load(app, task, body))
        return _json({"name": task, "version": protocol.version_of(added)})

    @route("/v2/repository/models/{task}/unload", "Stop serving a task", openapi.UNLOAD)
    async def unload(task: str, request: Request) -> Response:
        await admitted(request)
        try:
            await aside(lambda: app.classifier.remove_task(task))
        except UserError as error:
            raise RequestError(404, str(error)) from None
        return _json({"name": task})


def _load(app: App, name: str, body: bytes) -> Task:
    """Serve the task of a load request; megabytes are decoded here, so in a thread.

    Raises:
        RequestError: 400, 404 or 503.
    """
    parameters = protocol.parameters_in(protocol.parse_json(body)) if body.strip() else {}
    record, prompt = _uploaded(app, parameters)
    try:
        return app.classifier.add_task(name, record, prompt)
    except UserError as error:
        raise RequestError(404 if record is None else 400, str(error)) from None
    except Failure as error:
        raise RequestError(503, str(error)) from None


def _uploaded(app: App, parameters: dict[str, Any]) -> tuple[dict[str, Any] | None, Any]:
    """The task in a load request, as the protocol has it: `config`, its record as a JSON text, and
    `file:prompt.safetensors`, in base64. None and None: it is read from the bundle."""
    config, data = parameters.get("config"), parameters.get("file:prompt.safetensors")
    if config is None and data is None:
        return None, None
    if not isinstance(config, str) or not isinstance(data, str):
        raise RequestError(400, "give both 'config' and 'file:prompt.safetensors', or neither")
    try:
        record = json.loads(config)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(400, f"'config' is not JSON: {what}") from None
    try:  # without the line ends that `base64` and MIME put in
        content = base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise RequestError(400, f"'file:prompt.safetensors' is not base64: {error}") from None
    if not isinstance(record, dict):
        raise RequestError(400, "'config' must hold a JSON object")
    try:
        return record, parse_prompt(content, app.classifier.bundle, "file:prompt.safetensors")
    except Failure as error:
        raise RequestError(400, str(error)) from None
