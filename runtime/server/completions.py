"""POST /v1/completions."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from runtime.server.completion_request import CompletionRequest
from runtime.server.completion_response import Completion, CompletionForm
from runtime.server.errors import invalid_request
from runtime.server.openapi import generation_responses
from runtime.server.request_log import record_of
from runtime.server.requests import check_length, check_num_answers, engine_requests
from runtime.server.respond import Call
from runtime.server.service import Service, service_of

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", response_model=Completion, responses=generation_responses(Completion))
async def create_completion(
    http: Request, body: CompletionRequest, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Go on with text or token ids, at once or in server-sent events."""
    record = record_of(http.scope)
    if service.settings.log_prompts:
        record.prompts = list(body.prompts)
    check_num_answers(service, body, len(body.prompts))  # before the time that tokenizing takes
    prompts = [await _ids(service, prompt) for prompt in body.prompts]
    requests = engine_requests(service, body, prompts, "max_tokens", record.client or body.user or "")
    head = service.response_head("cmpl", body.model)
    form = CompletionForm(head, service.engine.token_text, body.n or 1)
    return await Call(http, service, body, requests, form, "prompt", "max_tokens").respond()


async def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    check_length(service, [prompt], "prompt")
    # Long texts take long; others are to be served meanwhile.
    ids = await asyncio.to_thread(service.engine.tokenize, prompt)
    if not ids:
        raise invalid_request("prompt: it has no tokens; expected at least one", "prompt")
    return ids
