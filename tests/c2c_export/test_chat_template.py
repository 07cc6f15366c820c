"""Rendered chats against transformers' apply_chat_template, and how a template's refusal reaches the user."""

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from c2c_export.chat_template import compile_template, render
from c2c_export.errors import C2CError

GOLDEN = Path(__file__).parent.parent / "golden"
TEMPLATES = [
    (GOLDEN / "qwen3_from_llama_aligned" / "receiver" / "chat_template.jinja").read_text(),
    (GOLDEN / "llama_from_gemma3_aligned" / "sharer" / "chat_template.jinja").read_text(),
    # trim_blocks, lstrip_blocks and a trailing line end
    "{% for m in messages %}\n    {% if m.role %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\nend\n\n",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if not m.content %}{% continue %}{% endif %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}\n{% endgeneration %}{{ x }}{% endfor %}",
    "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}"
    "{{ ns.n }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}{{ pad_token }}{{ eos_token }}[{{ bos_token }}]",
    "{{ tools is none }}{{ documents is none }}{{ enable_thinking is defined and enable_thinking is false }}"
    "{{ add_generation_prompt }}{{ undefined_thing }}{{ messages[-1].content.split('a')[-1] | trim }}",
    "{{ messages[0]['content'] | upper | replace('A', '<') }}{{ messages | map(attribute='role') | join(',') }}",
]
CHATS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=12)}),
    min_size=1,
    max_size=4,
)
MESSAGES = [{"role": "user", "content": "Hi"}]


@settings(max_examples=25, deadline=None)
@given(messages=CHATS, add_generation_prompt=st.booleans())
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_rendered_as_by_transformers(template, messages, add_generation_prompt):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "qwen3_from_llama_aligned" / "receiver")
    expected = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
    )
    variables = tokenizer.special_tokens_map
    got = render(template, messages, add_generation_prompt=add_generation_prompt, variables=variables)
    assert got == expected


def test_the_date_is_todays():
    text = render("{{ strftime_now('%Y') }}", MESSAGES, add_generation_prompt=True, variables={})
    assert text == str(datetime.now().year)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "of .list. object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "leading underscore"),
        ("{{ namespace(_x=1) }}", "leading underscore"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(template, reason):
    with pytest.raises(C2CError, match=f"the chat template does not accept these messages: .*{reason}"):
        render(template, MESSAGES, add_generation_prompt=True, variables={})


def test_a_template_that_does_not_compile_names_origin_and_line():
    with pytest.raises(C2CError, match=r"^model x: not a valid Jinja template: line 2: .* unknown tag 'nonsense'"):
        compile_template("{{ 1 }}\n{% nonsense %}", "model x")


def test_rendering_leaves_the_messages_as_they_are():
    messages = [{"role": "user", "content": "Hi"}]
    render("{% set _ = messages[0] %}x", messages, add_generation_prompt=False, variables={})
    assert messages == [{"role": "user", "content": "Hi"}]
