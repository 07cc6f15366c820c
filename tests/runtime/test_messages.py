"""What a user may give as a chat, and how the rest is refused."""

import pytest

from c2c_export.errors import UsageError
from runtime.messages import Message, parse_messages


def test_a_string_is_one_user_turn():
    assert parse_messages("Hi") == [Message("user", "Hi")]


def test_messages_may_be_mappings_or_messages():
    prompt = [{"role": "system", "content": ""}, Message("user", "Hi"), {"role": "user", "content": "x", "name": None}]
    assert parse_messages(prompt) == [Message("system", ""), Message("user", "Hi"), Message("user", "x")]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([{"role": "user", "content": ""}], "the prompt is empty"),
        (None, "of type NoneType; expected text or a list of messages"),
        (b"Hi", "of type bytes; expected text or a list"),
        ({"role": "user", "content": "Hi"}, "of type dict; expected text or a list"),
        (["Hi"], "message 0 is of type str; expected a mapping"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 1 has no field 'role'"),
        ([{"role": "user"}], "message 0 has no field 'content'"),
        ([{"role": "user", "content": None}], "message 0: content is of type NoneType; expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0: content is of type list"),
        ([{"role": 3, "content": "a"}], "message 0: role is of type int"),
        ([{"role": "", "content": "a"}], "message 0: role is empty"),
        ([Message("user", 3)], "message 0: content is of type int"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "message 0 has a field 'tool_calls'"),
        ("a\ud800b", "the prompt: content is not valid Unicode .* character 1"),
    ],
)
def test_a_malformed_prompt_is_refused_by_message_and_field(prompt, message):
    with pytest.raises(UsageError, match=message):
        parse_messages(prompt)
