"""POST /v1/chat/completions."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from runtime.server.chat_request import ChatRequest
from runtime.server.chat_response import ChatChunk, ChatCompletion, ChatForm
from runtime.server.openapi import generation_responses
from runtime.server.request_log import record_of
from runtime.server.requests import check_length, engine_requests
from runtime.server.respond import Call
from runtime.server.service import Service, service_of

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=generation_responses(ChatChunk))
async def create_chat_completion(
    http: Request, body: ChatRequest, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Answer a chat, at once or in server-sent events."""
    record = record_of(http.scope)
    messages = [message.as_prompt for message in body.messages]
    if service.settings.log_prompts:
        record.prompts = [messages]
    check_length(service, (message["content"] for message in messages), "messages", len(messages))
    requests = engine_requests(service, body, [messages], body.tokens_field, record.client or body.user or "")
    form = ChatForm(service.response_head("chatcmpl", body.model), service.engine.token_text)
    return await Call(http, service, body, requests, form, "messages", body.tokens_field).respond()
