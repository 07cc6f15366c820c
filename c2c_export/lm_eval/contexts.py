"""A request's context as the harness passes it on: raw text, or a chat.

The harness has strings only: `apply_chat_template` renders messages, and the text comes back with each request. C2C
needs the messages, as an aligned pair fuses just their texts, so the rendered text keeps them as an attribute. It
survives the harness's caches of requests, which pickle.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from c2c_export.chat_template import render
from c2c_export.errors import UsageError
from c2c_export.tokenizer import BundledTokenizer
from runtime import Message
from runtime.messages import parse_messages


class ChatContext(str):
    """The text that the receiver reads of a chat, with the chat. Strings made of it are plain ones again."""

    messages: tuple[Message, ...]
    reply: str
    """What the assistant's answer begins with, prescribed by the task; "" if nothing."""

    def __new__(cls, text: str, messages: Sequence[Message], reply: str) -> "ChatContext":
        """`text` is all of it, the beginning of the reply included."""
        context = super().__new__(cls, text)
        context.messages = tuple(messages)
        context.reply = reply
        return context

    def __getnewargs__(self) -> tuple[str, tuple[Message, ...], str]:  # type: ignore[override]
        """What a copy, or the other end of a pickle, is made of."""
        return str(self), self.messages, self.reply


def render_chat(
    tokenizer: BundledTokenizer, chat: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> ChatContext:
    """The chat as the receiver of this tokenizer reads it.

    Without `add_generation_prompt` its last message is the beginning of the assistant's answer, which the text ends
    with. Raises `UsageError` for messages that are none, and `C2CError` when the chat template refuses them.
    """
    messages, reply = parse_messages(chat), ""
    if not add_generation_prompt:
        if messages[-1].role != "assistant" or len(messages) == 1:
            raise UsageError("a chat that is to be continued ends in the assistant's message, after another one")
        reply = messages.pop().content
    text = render(
        tokenizer.chat_template,
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        variables=tokenizer.special.template_variables,
    )
    return ChatContext(text + reply, messages, reply)
