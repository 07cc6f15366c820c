"""The body of POST /v1/completions."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from runtime.server.generation_fields import Alternatives, GenerationFields, Text
from runtime.server.unserved_fields import IN_A_COMPLETION

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Rows = list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]]
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def _kind_of(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return "<text>"
    first = prompt[0] if prompt else ""
    if isinstance(first, list):
        return "<rows>"
    return "<row>" if isinstance(first, int) else "<texts>"


class CompletionRequest(GenerationFields):
    """Text, or token ids, that the model goes on with; no chat template is applied."""

    unserved = IN_A_COMPLETION

    prompt: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<texts>")]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Tag("<row>")]
        | Annotated[_Rows, Field(min_length=1, fail_fast=True), Tag("<rows>")],
        Discriminator(_kind_of),
    ] = Field(description="A text, a row of the receiver's token ids, or a list of either.")
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=1, description="Tokens to generate at most.")
    logprobs: Alternatives | None = Field(
        None, description="Return the tokens with their log-probabilities, and so many alternatives for each."
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def max_new_tokens(self) -> int:
        """Tokens to generate at most."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_alternatives(self) -> int | None:
        """As `Request.logprobs`."""
        return self.logprobs
