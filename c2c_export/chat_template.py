"""Chat templates: from messages to the text that a model reads.

In: a Jinja template as it comes with a model, and messages with `role` and `content`. Out: exactly the text that
transformers' `apply_chat_template(..., tokenize=False, enable_thinking=False)` renders. Not covered: tools, documents,
several templates in one model, message contents other than text. Nothing here imports torch or transformers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from c2c_export.errors import C2CError, PromptError


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, str],
) -> str:
    """The chat of `messages` as text.

    `variables` are the special tokens that the template may name; with `add_generation_prompt` the text ends where the
    assistant's answer begins. Raises `PromptError` with the template's own message when it refuses the messages or
    fails, `C2CError` when it is broken.
    """
    compiled = compile_template(template, "the bundle's chat template")
    try:
        return compiled.render(
            **{
                **variables,
                "messages": [dict(message) for message in messages],
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "enable_thinking": False,
            }
        )
    except Exception as error:  # a template is a program from elsewhere and may fail in any way
        raise PromptError(f"the chat template does not accept these messages: {error}") from error


def compile_template(template: str, origin: str) -> jinja2.Template:
    """Compile `template` as transformers does. Raises `C2CError` with `origin`, line and message if that fails."""
    try:
        return _compile(template)
    except jinja2.TemplateSyntaxError as error:
        raise C2CError(f"{origin}: not a valid Jinja template: line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise C2CError(f"{origin}: not a valid Jinja template: {error}") from error


@lru_cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_DictFactory(),
        namespace=_Namespace,
    )
    return environment.from_string(template)


class _GenerationTag(jinja2.ext.Extension):
    # {% generation %}…{% endgeneration %} marks the assistant's words for training; rendering shows what it encloses.

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers, because its body is a scope of its own.
        return jinja2.nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Callable[[], str]) -> str:
        return caller()


class _DictFactory:
    # `dict(…)` without the class itself, whose unbound methods would change what the sandbox keeps immutable.

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    # Attributes with a leading underscore would reach the interpreter's internals. `self` is not named in the
    # signature so that a template may write namespace(self=…), as with jinja2's own class.

    def __init__(*args: Any, **entries: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **entries)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no attribute with a leading underscore: {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)
