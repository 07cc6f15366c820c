"""From a checked body to the engine's requests: one for each answer, with the server's limits applied."""

from collections.abc import Sequence
from typing import TypeVar

from runtime.conversation import Prompt
from runtime.request import Request
from runtime.sampling import SamplingParams
from runtime.server.chat_request import ChatRequest
from runtime.server.completion_request import CompletionRequest
from runtime.server.errors import closing, invalid_request
from runtime.server.generation_fields import GenerationFields
from runtime.server.service import Service


def engine_requests(
    service: Service,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    tokens_field: str,
    client: str,
) -> list[Request]:
    """`n` requests for each prompt, those of one prompt together.

    `tokens_field` is the body's name for the tokens to generate. Raises an `ApiError` that names the field for what this
    server does not serve.
    """
    if service.closing:
        raise closing()
    settings = service.settings
    sharers = service.models.sharers_for(body.model, body.fuse, body.sharers)
    num_answers = body.n or 1
    if num_answers * len(prompts) > settings.max_choices:
        raise invalid_request(
            f"n: {num_answers * len(prompts)} answers are asked for ({len(prompts)} prompts, {num_answers} to each); "
            f"this server gives at most {settings.max_choices} to one request",
            "n",
        )
    limit, max_new_tokens = settings.max_tokens, body.max_new_tokens
    # What the client did not ask for must not make its prompt too long.
    given = max_new_tokens is not None and tokens_field in body.model_fields_set
    if given and limit is not None and max_new_tokens > limit:
        raise invalid_request(
            f"{tokens_field}: {max_new_tokens} is not allowed; this server generates at most {limit} tokens",
            tokens_field,
        )
    return [
        Request(
            prompt=prompt,
            fuse=bool(sharers),
            sharers=sharers,
            max_new_tokens=_least(max_new_tokens, limit),
            shorten=not given,
            ignore_eos=bool(body.ignore_eos),
            stop=body.stops,
            sampling=_sampling(body, index),
            logprobs=body.num_alternatives,
            priority=body.priority or 0,
            deadline=_least(body.deadline, settings.timeout),
            client=client,
        )
        for prompt in prompts
        for index in range(num_answers)
    ]


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
