"""From a checked body to the engine's requests: one for each answer, with the server's limits applied."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from runtime.conversation import Prompt
from runtime.request import Request
from runtime.sampling import SamplingParams
from runtime.server.chat_request import ChatRequest
from runtime.server.completion_request import CompletionRequest
from runtime.server.errors import invalid_request
from runtime.server.service import Service

_CHARACTERS_PER_TOKEN = 32
"""More than ordinary text has by far."""


def engine_requests(
    service: Service,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    tokens_field: str,
    client: str,
) -> list[Request]:
    """`n` requests for each prompt, those of one prompt together.

    `tokens_field` is the body's name for the tokens to generate. Raises an `ApiError` that names the field for what
    this server does not serve.
    """
    service.check_ready()
    settings = service.settings
    sharers = service.models.sharers_for(body.model, body.fuse, body.sharers)
    check_num_answers(service, body, len(prompts))
    limit, wanted = settings.max_tokens, body.max_new_tokens
    # What the client did not ask for must not make its prompt too long.
    given = wanted is not None and tokens_field in body.model_fields_set
    if given and wanted is not None and limit is not None and wanted > limit:
        message = f"{wanted} is not allowed; this server generates at most {limit} tokens"
        raise invalid_request(f"{tokens_field}: {message}", tokens_field)
    priority = body.priority
    if priority is not None and priority > settings.max_priority:
        message = f"{priority} is not allowed; this server takes at most {settings.max_priority}"
        raise invalid_request(f"priority: {message}", "priority")
    return [
        Request(
            prompt=prompt,
            fuse=bool(sharers),
            sharers=sharers,
            max_new_tokens=_least(wanted, limit),
            shorten=not given,
            ignore_eos=bool(body.ignore_eos),
            stop=body.stops,
            sampling=_sampling(body, index),
            logprobs=body.num_alternatives,
            priority=min(0, settings.max_priority) if priority is None else priority,
            deadline=_least(body.deadline, settings.timeout or None),
            client=client,
        )
        for prompt in prompts
        for index in range(body.n or 1)
    ]


def check_num_answers(service: Service, body: ChatRequest | CompletionRequest, num_prompts: int) -> None:
    """Raise an `ApiError` where one request asks for more answers than this server gives to one."""
    num_answers, limit = body.n or 1, service.settings.max_choices
    if num_answers * num_prompts > limit:
        raise invalid_request(
            f"n: {num_answers * num_prompts} answers are asked for ({num_prompts} prompts, {num_answers} to each); "
            f"this server gives at most {limit} to one request",
            "n",
        )


def check_length(service: Service, texts: Iterable[str], field: str, num_messages: int = 1) -> None:
    """Raise an `ApiError` for a prompt that is too long beyond doubt, before the time that tokenizing it takes."""
    capacity = service.engine.bundle.manifest.max_length
    if num_messages > capacity:
        found, most = f"{num_messages} messages", f"{capacity}"
    elif (length := sum(map(len, texts))) > _CHARACTERS_PER_TOKEN * capacity:
        found, most = f"{length} characters", f"{_CHARACTERS_PER_TOKEN * capacity}"
    else:
        return
    what = f"a prompt of {found} is too long; this bundle's capacity is {capacity} tokens, and it takes at most {most}"
    raise invalid_request(f"{field}: {what}", field, "context_length_exceeded")


def _sampling(body: ChatRequest | CompletionRequest, index: int) -> SamplingParams:
    """How answer number `index` to a prompt is drawn; null is OpenAI's default."""
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=None if body.seed is None else body.seed + index,
    )


_Number = TypeVar("_Number", int, float)


def _least(*limits: _Number | None) -> _Number | None:
    return min((limit for limit in limits if limit is not None), default=None)
