"""Routes for the administrator, behind a key of their own; without that key they do not exist."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from opennemo.errors import InvalidRequest
from opennemo.serve.error_bodies import Json, Refusal
from opennemo.serve.protocols.schema import AdapterRequest
from opennemo.serve.service import TheService

router = APIRouter()


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: AdapterRequest, service: TheService) -> Response:
    """Load an adapter from a folder below `--lora-root`."""
    engine, root = service.llm.engine, service.settings.lora_root
    if root is None:
        raise InvalidRequest("lora_path: the server was started without --lora-root")
    folder = (root / (body.lora_path or body.lora_name)).resolve()
    if not folder.is_relative_to(root.resolve()) or "://" in (body.lora_path or ""):
        raise InvalidRequest("lora_path: must be a folder below --lora-root")
    if body.lora_name in service.names or body.lora_name in engine.adapters:
        raise InvalidRequest(f"lora_name: {body.lora_name} exists already")
    await asyncio.to_thread(service.llm.load_adapter, body.lora_name, folder)
    return Json({"message": f"Success: LoRA adapter {body.lora_name} added."})


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: AdapterRequest, service: TheService) -> Response:
    """Unload an adapter; answers that use it finish with it."""
    if not service.llm.engine.unload_adapter(body.lora_name):
        raise Refusal(404, f"there is no adapter {body.lora_name!r}", type="invalid_model")
    return Json({"message": f"Success: LoRA adapter {body.lora_name} removed."})


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(service: TheService) -> Response:
    """Forget all cached prompts."""
    await asyncio.to_thread(service.llm.engine.reset_prefix_cache)
    return Json({"message": "The prefix cache is empty."})


@router.post("/restart_replicas")
async def restart_replicas(service: TheService) -> Response:
    """Replace all replicas, one after the other, with the model as it is on disk now."""
    if not service.settings.replicas:
        raise InvalidRequest("the server was started without --replicas")
    await asyncio.to_thread(service.llm.engine.deploy)  # pyright: ignore
    return Json({"message": "All replicas are new."})


@router.post("/sleep")
async def sleep(service: TheService) -> Response:
    """Finish running requests, then free the cache's memory, and a GPU's; answer 503 meanwhile."""
    await service.sleep()
    return Json({"is_sleeping": True})


@router.post("/wake_up")
async def wake_up(service: TheService) -> Response:
    """Accept requests again."""
    await service.wake()
    return Json({"is_sleeping": service.asleep})


@router.get("/is_sleeping")
async def is_sleeping(service: TheService) -> Response:
    return Json({"is_sleeping": service.asleep})


@router.get("/server_info")
async def server_info(service: TheService) -> Response:
    """The settings, without keys."""
    settings = service.settings.model_dump(mode="json", exclude={"api_key", "admin_key"})
    return Json({"settings": settings, "n_active": len(service.active)})
