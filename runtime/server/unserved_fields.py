"""The fields of OpenAI's API that this server does not serve, with the values besides null that ask for nothing.

With any other value a request is refused by the field's name: whoever sets it would miss what it does.
"""

from collections.abc import Mapping
from typing import Any

UnservedFields = Mapping[str, tuple[Any, ...]]

IN_A_CHAT: UnservedFields = {
    "audio": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
IN_A_MESSAGE: UnservedFields = {
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}
IN_A_PART: UnservedFields = {"file": (), "image_url": (), "input_audio": (), "refusal": ()}
"""Of a message's content: images and the like, which have parts of their own types."""
IN_A_COMPLETION: UnservedFields = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "suffix": (),
}
IN_STREAM_OPTIONS: UnservedFields = {"include_obfuscation": (False,)}
