"""The fields that a chat and a completion request share, checked; and OpenAI's fields that are not served.

Nothing is ignored silently: a field that OpenAI's API does not know either is an error, and so is one that it knows and
this server does not serve, unless its value asks for nothing. Not covered: what a field means to the engine
(`runtime.server.requests`).
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from runtime.request import MAX_ALTERNATIVES
from runtime.server.settings import MAX_PRIORITY
from runtime.server.unserved_fields import IN_STREAM_OPTIONS, UnservedFields

MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000
_MAX_NAME_LENGTH = 256
_MAX_SEED = 2**63 - 1
_MAX_PENALTY = 100.0


def _check_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "unicode", "not valid Unicode (a lone surrogate at character {at})", {"at": error.start}
        ) from error
    return text


def is_list(value: Any) -> str:
    """The tag of a union's alternative that is a list, or of the one that is not."""
    return "<list>" if isinstance(value, list) else "<text>"


Text = Annotated[str, AfterValidator(_check_unicode)]
"""Text that can be encoded: JSON lets lone surrogates through."""
Name = Annotated[str, Field(max_length=_MAX_NAME_LENGTH), AfterValidator(_check_unicode)]
StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH), AfterValidator(_check_unicode)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")]
    | Annotated[None, Tag("<null>")],
    Discriminator(lambda value: "<null>" if value is None else is_list(value)),
]


def disagreement(param: str, message: str) -> PydanticCustomError:
    """The error of a field that does not go with another one."""
    return PydanticCustomError("disagreement", "{message}", {"param": param, "message": message})


class StrictModel(BaseModel):
    """What a client sends. `unserved` names fields of OpenAI's API with the values that ask for nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    unserved: ClassVar[UnservedFields] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        # Not left to pydantic, which would list every one of a hundred thousand.
        unknown = next((name for name in content if name not in cls.model_fields and name not in cls.unserved), None)
        if unknown is not None:
            name = unknown.encode("utf-8", "backslashreplace").decode()
            raise PydanticCustomError("unknown", "there is no such field", {"param": name})
        for name in cls.unserved.keys() & content.keys():
            value = content[name]
            # True is 1, and False 0, to Python's comparison.
            if not any(type(value) is type(neutral) and value == neutral for neutral in (None, *cls.unserved[name])):
                raise PydanticCustomError("unserved", "not served here; leave it out", {"param": name})
        return {name: value for name, value in content.items() if name not in cls.unserved}


class StreamOptions(StrictModel):
    """Options of a stream."""

    unserved = IN_STREAM_OPTIONS

    include_usage: bool = Field(False, description="End with a chunk that holds the usage, and no choices.")


class GenerationFields(StrictModel):
    """What chats and completions have in common."""

    model: Name = Field(description="One of those that /v1/models lists.")
    n: int | None = Field(1, ge=1, description="Answers to each prompt. The seed of answer i is seed + i.")
    stream: bool | None = Field(False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = None
    stop: Stop = Field(None, description="The answer ends before the first of these texts.")
    seed: int | None = Field(None, ge=0, le=_MAX_SEED, description="Of the random draws.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(1.0, ge=0, le=1)
    user: Name | None = Field(None, description="Users of one priority take turns, unless API keys tell clients apart.")
    sharers: Annotated[list[int], Field(fail_fast=True)] | None = Field(
        None, description="Extra: numbers of the sharers to use; all by default."
    )
    fuse: bool | None = Field(None, description="Extra: false is the receiver alone.")
    top_k: int | None = Field(None, ge=0, description="Extra: sample among the k most probable tokens; 0 is off.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Extra: sample among tokens this probable relative to the best."
    )
    repetition_penalty: float | None = Field(
        1.0, ge=1 / _MAX_PENALTY, le=_MAX_PENALTY, description="Extra: penalise repeated tokens; 1 is off."
    )
    ignore_eos: bool | None = Field(False, description="Extra: go on after stop tokens.")
    priority: int | None = Field(
        None,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="Extra: requests of higher priority are served first; 0 by default, or the most that is allowed.",
    )
    deadline: float | None = Field(None, gt=0, description="Extra: seconds after which the request ends with 408.")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> list[str]:
        """The texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


Alternatives = Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)]
"""How many tokens are wanted beside the chosen one."""
