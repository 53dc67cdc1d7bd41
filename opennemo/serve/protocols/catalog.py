"""The models, and their tokenizer: lists, cards, text to ids and back."""

from typing import Any

import anyio
from fastapi import APIRouter
from starlette.responses import Response

from opennemo.errors import InvalidRequest
from opennemo.serve.error_bodies import Json
from opennemo.serve.protocols.schema import DetokenizeRequest, TokenizeRequest
from opennemo.serve.service import NEMO_NAMES, Service, TheService
from opennemo.tokenizer.chat import encode_chat

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: TheService) -> Response:
    """The model under each of its names, and its adapters."""
    names = [*service.names, *service.llm.engine.adapters]
    return Json({"object": "list", "data": [card(service, name) for name in names]})


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: TheService) -> Response:
    """One model or adapter."""
    service.adapter(name)
    return Json(card(service, name))


def card(service: Service, name: str) -> dict[str, Any]:
    """A model's description that OpenAI's and Mistral's clients both accept."""
    llm = service.llm
    is_adapter = service.adapter(name) is not None
    is_nemo = service.names[0] in NEMO_NAMES
    chats = llm.tokenizer.instruct_version is not None or llm.tokenizer.chat_template is not None
    length = llm.engine.max_context
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "mistralai" if is_nemo and not is_adapter else "opennemo",
        "type": "base",  # "fine-tuned" cards must name a training job
        "name": llm.name,
        "description": None,
        "max_context_length": length,
        "max_model_len": length,
        "root": service.names[0],
        "parent": service.names[0] if is_adapter else None,
        "aliases": [] if is_adapter else [other for other in service.names if other != name],
        "deprecation": None,
        "default_model_temperature": llm.defaults.temperature,
        "capabilities": {
            "completion_chat": chats,
            "completion_fim": False,
            "function_calling": chats and llm.tokenizer.instruct_version != "v1",
            "fine_tuning": True,
            "vision": False,
        },
        "permission": [],
    }


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(body: TokenizeRequest, service: TheService) -> Response:
    """Ids of a text, or of a conversation with its layout."""
    body.ignored(strict=service.settings.strict_params)
    service.adapter(body.model)
    llm = service.llm
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt: give either that or messages")

    def encode() -> list[int]:
        if body.messages is not None:
            return encode_chat(llm.tokenizer, body.messages, body.tools)
        text = body.prompt or ""
        return llm.encode(text) if body.add_special_tokens else llm.tokenizer.encode(text)

    tokens = await anyio.to_thread.run_sync(encode)
    content = {"count": len(tokens), "max_model_len": llm.engine.max_context, "tokens": tokens}
    names = llm.tokenizer.control_names
    if body.return_token_strs:
        content["token_strs"] = [names.get(id) or llm.tokenizer.decode([id]) for id in tokens]
    return Json(content)


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeRequest, service: TheService) -> Response:
    """Text of ids, control tokens by name."""
    body.ignored(strict=service.settings.strict_params)
    service.adapter(body.model)
    tokenizer = service.llm.tokenizer
    if any(id >= tokenizer.vocab_size for id in body.tokens):
        raise InvalidRequest(f"tokens: ids are from 0 to {tokenizer.vocab_size - 1}")
    return Json({"prompt": tokenizer.decode(body.tokens, show_control=True)})
