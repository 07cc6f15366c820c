"""The body of POST /v1/chat/completions."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from runtime.server.generation_fields import Alternatives, GenerationFields, StrictModel, Text, disagreement, is_list
from runtime.server.unserved_fields import IN_A_CHAT, IN_A_MESSAGE, IN_A_PART


class TextPart(StrictModel):
    """A part of a message's content."""

    unserved = IN_A_PART

    type: Literal["text"]
    text: Text


class ChatMessage(StrictModel):
    """A turn of a chat."""

    unserved = IN_A_MESSAGE

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is read as system.")
    content: Annotated[
        Annotated[Text, Tag("<text>")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("<list>")],
        Discriminator(is_list),
    ] = Field(description="Text, or parts of text, which are joined.")

    @property
    def as_prompt(self) -> dict[str, str]:
        """The message as the runtime takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationFields):
    """A chat that the model goes on with."""

    unserved = IN_A_CHAT

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most; up to the capacity.")
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(False, description="Return the tokens with their log-probabilities.")
    top_logprobs: Alternatives | None = Field(None, description="And so many alternatives for each.")

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise disagreement("top_logprobs", "only allowed when logprobs is true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise disagreement("max_tokens", "differs from max_completion_tokens; give one of them")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens to generate at most; None is up to the capacity."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def tokens_field(self) -> str:
        """Which of the two names was used."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_alternatives(self) -> int | None:
        """As `Request.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None
