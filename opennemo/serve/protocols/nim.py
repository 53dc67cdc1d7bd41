"""Health, metrics and descriptions, at the paths that NVIDIA NIM and vLLM gave them."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

import opennemo
from opennemo.serve.error_bodies import Json
from opennemo.serve.service import TheService

router = APIRouter()
OPEN = ("/health", "/ping", "/v1/health/live", "/v1/health/ready")  # need no key
METRICS = ("/metrics", "/v1/metrics")
LICENSE = {
    "name": "Apache-2.0",
    "path": "LICENSE",
    "sha": "",
    "size": 0,
    "type": "text",
    "url": "https://www.apache.org/licenses/LICENSE-2.0",
}


@router.get("/v1/health/live")
async def live(service: TheService) -> Response:
    """200 while the process runs and its engine makes progress."""
    return _health(service.is_alive, "Service is live.", "Service hangs, or its engine has ended.")


@router.get("/health")
@router.get("/ping")
@router.get("/v1/health/ready")
async def ready(service: TheService) -> Response:
    """200 while requests are accepted: the model has computed a token, and no shutdown began."""
    is_ready = service.is_ready and service.is_alive
    return _health(is_ready, "Service is ready.", "Service is not ready.")


def _health(good: bool, yes: str, no: str) -> Response:
    content = {"object": "health-response", "message": yes if good else no}
    return Json(content, 200 if good else 503, {} if good else {"retry-after": "5"})


@router.get("/metrics", response_class=PlainTextResponse)
@router.get("/v1/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, service: TheService) -> Response:
    """Prometheus' text format; NIM's own path has NIM's names, too."""
    text = service.metrics.render(nim=request.url.path.endswith("/v1/metrics"))
    return Response(text, media_type="text/plain; version=0.0.4")


@router.get("/version")
@router.get("/v1/version")
async def version() -> Response:
    """Versions of the server and of its API."""
    return Json({"release": opennemo.__version__, "api": "v1", "version": opennemo.__version__})


@router.get("/load")
async def load(service: TheService) -> Response:
    """How many requests are being answered, as vLLM reports it."""
    return Json({"server_load": len(service.active)})


@router.get("/v1/metadata")
async def metadata(service: TheService) -> Response:
    """What is served."""
    model = {"modelUrl": service.settings.model, "shortName": service.llm.name}
    return Json(
        {
            "assetInfo": [],
            "licenseInfo": LICENSE,
            "modelInfo": [model],
            "repository_override": "",
            "version": opennemo.__version__,
            "selectedModelProfileId": service.names[0],
        }
    )


@router.get("/v1/manifest")
async def manifest(service: TheService) -> Response:
    """The one profile that is served."""
    config = service.llm.engine.model_config
    return Json(
        {
            "model": service.names[0],
            "profiles": [{"id": service.names[0], "n_layers": config.n_layers, "dim": config.dim}],
        }
    )


@router.get("/v1/license")
async def license() -> Response:
    """The server's licence; a model has its own."""
    return Json(LICENSE)
