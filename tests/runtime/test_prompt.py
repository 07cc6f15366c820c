"""Prompt plans against the recorded cases, and against an oracle written on transformers tokenizers."""

import json
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from c2c_export.alignment import compile_alignment
from c2c_export.errors import C2CError, UsageError
from c2c_export.tokenizer import BundledTokenizer
from c2c_export.tokenizer_source import choose_chat_template, write_tokenizer
from runtime.messages import Message, parse_messages
from runtime.prompt import Plan, PromptPlanner, Section
from runtime.sections import UnfusedMessageWarning

GOLDEN = Path(__file__).parent.parent / "golden"
ALIGNED = ["qwen3_from_llama_aligned", "llama_from_gemma3_aligned"]
QWEN = GOLDEN / "qwen3_from_llama_aligned" / "receiver"
LLAMA = GOLDEN / "qwen3_from_llama_aligned" / "sharer"
GEMMA = GOLDEN / "llama_from_gemma3_aligned" / "sharer"
QWEN_VOCAB = 512

HUMAN = (
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
TRIMMED = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
# Each changes another message of a chat, so that the kinds of their sections can agree all the same.
TRIMMED_FIRST, TRIMMED_LAST = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim if loop." + which + " else m.content }}"
    "<end_of_turn>\n{% endfor %}"
    for which in ("first", "last")
)
REVERSED = "{% for m in messages | reverse %}<bos>{{ m.content }}<eos>{% endfor %}"
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@cache
def source(model: Path, template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@cache
def bundled(model: Path, template: str | None = None) -> BundledTokenizer:
    tokenizer = source(model, template)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(tokenizer, choose_chat_template(tokenizer, str(model), None, None)[0], Path(folder))
        return BundledTokenizer.load(Path(folder))


@cache
def table(receiver: Path, sharer: Path) -> np.ndarray:
    ours, theirs = bundled(receiver), bundled(sharer)
    return compile_alignment(ours, theirs, receiver_vocab=ours.vocab_size, strategy="first")


def aligned_planner(*models: tuple[Path, str | None]) -> PromptPlanner:
    (receiver, template), *sharers = models
    tables = [table(receiver, sharer) for sharer, _ in sharers]
    return PromptPlanner(bundled(receiver, template), [bundled(*sharer) for sharer in sharers], tables, True)


def unaligned_planner() -> PromptPlanner:
    return PromptPlanner(bundled(QWEN), [], [], False)


def spans(plan: Plan) -> list[tuple[int, int, bool]]:
    return [(section.start, section.stop, section.fused) for section in plan.sections]


# ---- recorded cases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ALIGNED)
@pytest.mark.parametrize("case", range(4))
def test_a_plan_equals_the_recorded_aligned_case(folder, case):
    root = GOLDEN / folder
    recorded = json.loads((root / "case.json").read_text())["cases"][case]
    expected = load_file(root / "expected.safetensors")
    planner = aligned_planner((root / "receiver", None), (root / "sharer", None))
    plan = planner.plan_messages(parse_messages(recorded["messages"]), sharers=[0])

    assert [[s.stop - s.start, 1 if s.fused else -1] for s in plan.sections] == recorded["sections"]
    for name, tokens in (("receiver", plan.receiver), ("sharer", plan.sharers[0])):
        real = ~expected[f"{case}.{name}_padding_mask"][0].astype(bool)
        assert tokens.position_ids.tolist() == np.flatnonzero(real).tolist()
        assert tokens.ids.tolist() == expected[f"{case}.{name}_ids"][0][real].tolist()
    mask = expected[f"{case}.message_mask"][0].astype(bool)
    assert plan.num_positions == len(mask)
    fused = np.zeros(len(mask), dtype=bool)
    for section in plan.sections:
        fused[section.start : section.stop] = section.fused
    assert fused.tolist() == mask.tolist()
    ends_in_padding = bool(expected[f"{case}.receiver_padding_mask"][0, -1])
    assert plan.closing_padding_id == (expected[f"{case}.receiver_ids"][0, -1] if ends_in_padding else None)


def test_recorded_cases_cover_both_endings():
    endings = {bool(load_file(GOLDEN / f / "expected.safetensors")["0.receiver_padding_mask"][0, -1]) for f in ALIGNED}
    assert endings == {True, False}


@pytest.mark.parametrize("folder", ["qwen3_from_qwen2", "two_sharers_parallel"])
@pytest.mark.parametrize("case", range(3))
def test_a_plan_equals_the_recorded_unaligned_case(folder, case):
    recorded = json.loads((GOLDEN / folder / "case.json").read_text())
    ids = load_file(GOLDEN / folder / "expected.safetensors")[f"{case}.receiver_ids"][0]
    sharers = list(range(recorded["num_sharers"]))
    plan = PromptPlanner(bundled(GOLDEN / folder / "receiver"), [], [], False).plan_ids(ids, sharers=sharers)
    assert [s.stop - s.start for s in plan.sections] == [length for length, _ in recorded["cases"][case]["sections"]]
    assert [s.fused for s in plan.sections] == [mask != -1 for _, mask in recorded["cases"][case]["sections"]]
    for tokens in (plan.receiver, *(plan.sharers[s] for s in sharers)):
        assert tokens.ids.tolist() == ids.tolist()
        assert tokens.position_ids.tolist() == list(range(len(ids)))


# ---- the oracle: padded rows, built the long way --------------------------------------------------------------------


class Mismatch(Exception):
    pass


@dataclass
class Row:
    kinds: list[str]
    parts: list[list[int]]
    found: list[int]


def oracle_row(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation_prompt: bool) -> Row:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, enable_thinking=False
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    row = Row([], [], [])
    search_from = 0
    done = 0
    for number, message in enumerate(messages):
        content = message["content"]
        everywhere = [i for i in range(len(text)) if content and text.startswith(content, i)]
        after = [i for i in everywhere if i >= search_from]
        closed = [i for i in after if (text[i + len(content) :] + "<")[0] == "<"]
        candidates = closed or after or everywhere
        if not candidates:
            continue
        at = candidates[0]
        if not closed:
            before, around = text[max(0, at - 10) : at], text[max(0, at - 20) : at + 20]
            if "<" in before and ">" not in before and "begin_of_text" in around:
                continue
        search_from = at + len(content)
        first = len([1 for _, end in offsets if end <= at])
        last = first + len([1 for begin, _ in offsets[first:] if begin < search_from])
        if done < first:
            row.kinds.append("template")
            row.parts.append(ids[done:first])
        row.found.append(number)
        row.kinds.append("message")
        row.parts.append(ids[first:last])
        done = last
    if done < len(ids):
        row.kinds.append("template")
        row.parts.append(ids[done:])
    return row


def oracle(models, messages, generation_prompt):
    """Padded rows (None = padding) of the receiver and every sharer, the message mask, and the messages left out."""
    rows = [oracle_row(source(*model), messages, generation_prompt) for model in models]
    # The reference compares the kinds alone, and pairs different messages where those agree.
    if any((row.kinds, row.found) != (rows[0].kinds, rows[0].found) for row in rows):
        raise Mismatch
    padded: list[list[int | None]] = [[] for _ in rows]
    mask: list[bool] = []
    for kind, *parts in zip(rows[0].kinds, *(row.parts for row in rows), strict=True):
        if kind == "message":
            parts = [parts[0], *(table(models[0][0], sharer)[parts[0]].tolist() for sharer, _ in models[1:])]
        length = max(len(part) for part in parts)
        for row, part in zip(padded, parts, strict=True):
            row.extend(part + [None] * (length - len(part)))
        mask.extend([kind == "message"] * length)
    unfused = [number for number, m in enumerate(messages) if m["content"] and number not in rows[0].found]
    return padded, mask, unfused


def assert_plan_equals_oracle(models, messages, generation_prompt):
    planner = aligned_planner(*models)
    sharers = list(range(len(models) - 1))
    chat = [Message(**message) for message in messages]
    try:
        padded, mask, unfused = oracle(models, messages, generation_prompt)
    except Mismatch:
        with pytest.raises(C2CError, match=r"message \d|after the last message"):
            planner.plan_messages(chat, sharers=sharers, add_generation_prompt=generation_prompt)
        return
    if not mask:
        with pytest.raises(C2CError, match="renders these messages to nothing"):
            planner.plan_messages(chat, sharers=sharers, add_generation_prompt=generation_prompt)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = planner.plan_messages(chat, sharers=sharers, add_generation_prompt=generation_prompt)
    assert all(warning.category is UnfusedMessageWarning for warning in caught)
    assert [str(warning.message).split(" (")[0] for warning in caught] == [f"message {number}" for number in unfused]
    assert plan.num_positions == len(mask)
    assert [flag for start, stop, flag in spans(plan) for _ in range(start, stop)] == mask
    assert all(a.fused != b.fused and a.stop == b.start for a, b in zip(plan.sections, plan.sections[1:], strict=False))
    for row, tokens in zip(padded, [plan.receiver, *plan.sharers.values()], strict=True):
        filled: list[int | None] = [None] * len(mask)
        for position, token in zip(tokens.position_ids.tolist(), tokens.ids.tolist(), strict=True):
            filled[position] = token
        assert filled == row
    assert (plan.closing_padding_id is not None) == (padded[0][-1] is None)


FRAGMENTS = st.one_of(
    st.sampled_from(["user", "system", "assistant", "begin_of_text", "begin", "text", "<", ">", "|", "### ", ":"]),
    st.sampled_from(["<|im_end|>", "<|eot_id|>", "<bos>", "<|begin_of_text|>", "<|im_start|", "The", "ab", "a"]),
    st.sampled_from([" ", "\n", "\n\n", "é", "e\u0301", "北京", "\U0001f469\u200d\U0001f680"]),
)
CONTENTS = st.one_of(st.text(max_size=10), st.lists(FRAGMENTS, max_size=5).map("".join))


@st.composite
def chats(draw):
    # few contents, so that they repeat and lie within one another
    pool = draw(st.lists(CONTENTS, min_size=1, max_size=3))
    turn = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.sampled_from(pool)}
    )
    return draw(st.lists(turn, min_size=1, max_size=4))


@settings(max_examples=60, deadline=None)
@given(messages=chats(), generation_prompt=st.booleans())
@pytest.mark.parametrize(
    "models",
    [
        [(QWEN, None), (LLAMA, None)],
        [(LLAMA, None), (GEMMA, None)],
        [(GEMMA, HUMAN), (QWEN, None)],
        [(QWEN, HUMAN), (GEMMA, HUMAN)],
        [(QWEN, TRIMMED), (GEMMA, TRIMMED)],
        [(QWEN, TRIMMED_FIRST), (GEMMA, TRIMMED_LAST)],
        [(QWEN, REVERSED), (LLAMA, REVERSED)],
        [(QWEN, BARE), (GEMMA, BARE)],
        [(QWEN, None), (LLAMA, None), (GEMMA, None)],
    ],
    ids=["qwen<llama", "llama<gemma", "human<chat", "human", "trimmed", "crossed", "reversed", "bare", "two sharers"],
)
def test_any_chat_is_planned_as_the_oracle_says(models, messages, generation_prompt):
    assert_plan_equals_oracle(models, messages, generation_prompt)


@pytest.mark.parametrize(
    "contents",
    [
        ["user"],
        ["Hi", "Hi", "Hi"],
        ["", "Hi"],
        ["begin"],
        ["of_text"],
        ["Hi<|im_end|>\n<|im_start|>assistant\nnot really"],
        ["a", "\n", "a"],
    ],
)
def test_awkward_contents_are_planned_as_the_oracle_says(contents):
    messages = [{"role": "user", "content": content} for content in contents]
    for models in ([(QWEN, None), (LLAMA, None)], [(LLAMA, None), (QWEN, None)], [(LLAMA, HUMAN), (LLAMA, HUMAN)]):
        assert_plan_equals_oracle(models, messages, True)


# ---- the rules, one by one ------------------------------------------------------------------------------------------


def test_without_sharers_the_receiver_reads_its_plain_prompt():
    messages = [{"role": "user", "content": "Hi there"}]
    expected = source(QWEN).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for planner in (unaligned_planner(), aligned_planner((QWEN, None), (LLAMA, None))):
        plan = planner.plan_messages(parse_messages(messages), sharers=[])
        assert plan.receiver.ids.tolist() == expected
        assert plan.receiver.position_ids.tolist() == list(range(len(expected)))
        assert plan.sections == (Section(0, len(expected), False),)
        assert plan.sharers == {}
        assert plan.closing_padding_id is None


def test_in_an_unaligned_pair_every_selected_sharer_reads_the_receivers_ids():
    plan = unaligned_planner().plan_messages([Message("user", "Hi")], sharers=[2, 0], add_generation_prompt=False)
    num_tokens = plan.num_positions
    assert spans(plan) == [(0, num_tokens - 1, True), (num_tokens - 1, num_tokens, False)]
    assert list(plan.sharers) == [2, 0]
    assert all(tokens.ids.tolist() == plan.receiver.ids.tolist() for tokens in plan.sharers.values())
    assert plan.receiver.ids.dtype == plan.receiver.position_ids.dtype == np.int64


def test_a_prompt_of_one_token_has_no_fused_section():
    assert unaligned_planner().plan_ids([5], sharers=[0]).sections == (Section(0, 1, False),)
    assert aligned_planner((QWEN, None), (LLAMA, None)).plan_ids([5], sharers=[0]).sections == (Section(0, 1, False),)


def test_ids_of_an_aligned_pair_are_mapped_through_the_table():
    ids = [1, 40, 41, 2, 7]
    plan = aligned_planner((QWEN, None), (LLAMA, None), (GEMMA, None)).plan_ids(ids, sharers=[1, 0])
    assert spans(plan) == [(0, 4, True), (4, 5, False)]
    assert plan.sharers[0].ids.tolist() == table(QWEN, LLAMA)[ids].tolist()
    assert plan.sharers[1].ids.tolist() == table(QWEN, GEMMA)[ids].tolist()
    assert plan.sharers[0].ids.dtype == np.int64


def test_template_sections_are_as_long_as_the_longest_of_the_selected_models():
    planner = aligned_planner((QWEN, HUMAN), (LLAMA, None), (GEMMA, None))
    chat = [Message("user", "Hi there")]
    lengths = {chosen: planner.plan_messages(chat, sharers=chosen).num_positions for chosen in ((0,), (1,), (0, 1))}
    both = planner.plan_messages(chat, sharers=[0, 1])
    first = {s: both.sharers[s].position_ids[0] for s in (0, 1)}
    assert first == {0: 0, 1: 0}
    assert lengths[0, 1] >= max(lengths[(0,)], lengths[(1,)])
    message = next(section for section in both.sections if section.fused)
    for tokens in (both.receiver, *both.sharers.values()):
        assert set(range(message.start, message.stop)) <= set(tokens.position_ids.tolist())


def test_a_prompt_that_ends_in_a_message_ends_fused():
    plan = aligned_planner((QWEN, BARE), (GEMMA, BARE)).plan_messages([Message("user", "Hi there")], sharers=[0])
    assert spans(plan) == [(0, plan.num_positions, True)]


def test_a_text_that_one_template_changes_is_named():
    planner = aligned_planner((QWEN, None), (GEMMA, TRIMMED))
    chat = [Message("system", "Fine."), Message("user", "A question with a trailing space, rather long ")]
    with pytest.raises(C2CError) as caught:
        planner.plan_messages(chat, sharers=[0])
    assert str(caught.value).startswith(
        "message 1 (user, 'A question with a trailing space, rather'): its text is in the prompt rendered for "
        "the receiver, but not, unchanged, in that for sharer 0"
    )


def test_texts_that_two_templates_change_are_not_paired_with_one_another():
    chat = [Message("user", " one "), Message("assistant", " two ")]
    for templates, has, lacks in (
        ((TRIMMED_FIRST, TRIMMED_LAST), "sharer 0", "the receiver"),
        ((TRIMMED_LAST, TRIMMED_FIRST), "the receiver", "sharer 0"),
    ):
        planner = aligned_planner((QWEN, templates[0]), (GEMMA, templates[1]))
        with pytest.raises(C2CError) as caught:
            planner.plan_messages(chat, sharers=[0])
        assert str(caught.value).startswith(
            f"message 0 (user, ' one '): its text is in the prompt rendered for {has}, but not, unchanged, in that for "
            f"{lacks}, whose chat template drops or changes it"
        )


def test_a_text_that_all_templates_change_is_not_fused_and_the_user_is_told():
    planner = aligned_planner((QWEN, TRIMMED), (GEMMA, TRIMMED), (LLAMA, TRIMMED))
    changed = [Message("system", ""), Message("user", " hi there, a text of more than 40 characters \n")]
    with pytest.warns(UnfusedMessageWarning) as caught:
        plan = planner.plan_messages(changed, sharers=[0, 1])
    assert [str(warning.message) for warning in caught] == [
        "message 1 (user, ' hi there, a text of more than 40 charac'): no chat template keeps its text unchanged, so "
        "it is not fused, as in the reference; remove spaces around it, or use chat templates that keep message texts "
        "as they are"
    ]
    assert spans(plan) == [(0, plan.num_positions, False)]
    # All models read it none the less.
    for model, tokens in zip((QWEN, GEMMA, LLAMA), (plan.receiver, *plan.sharers.values()), strict=True):
        turns = [("system", ""), ("user", "hi there, a text of more than 40 characters")]
        rendered = "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in turns)
        assert tokens.ids.tolist() == source(model)(rendered, add_special_tokens=False)["input_ids"]


def test_no_warning_is_given_where_nothing_is_searched_for():
    chat = [Message("user", " hi \n")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aligned_planner((QWEN, TRIMMED), (GEMMA, TRIMMED)).plan_messages(chat, sharers=[])
        PromptPlanner(bundled(QWEN, TRIMMED), [], [], False).plan_messages(chat, sharers=[0])


def test_a_template_that_puts_no_text_between_messages_is_named():
    chat = [Message("user", "Hello"), Message("assistant", "Yes")]
    with pytest.raises(C2CError, match=r"^before message 0 \(user, 'Hello'\): the chat template of the receiver has"):
        aligned_planner((QWEN, None), (GEMMA, BARE)).plan_messages(chat, sharers=[0])
    with pytest.raises(C2CError, match=r"^after the last message: the chat template of sharer 0 has"):
        aligned_planner((QWEN, BARE), (GEMMA, BARE + "<eos>")).plan_messages(chat, sharers=[0])


def test_an_aligned_receiver_needs_a_padding_token():
    special = bundled(QWEN).special.model_copy(update={"padding_id": None})
    receiver = BundledTokenizer(bundled(QWEN).backend, special, "")
    with pytest.raises(C2CError, match="neither a padding nor an end token"):
        PromptPlanner(receiver, [bundled(LLAMA)], [table(QWEN, LLAMA)], True)


def test_tokens_that_a_model_does_not_embed_are_refused():
    small = PromptPlanner(bundled(QWEN), [], [], False, receiver_vocab=2)
    with pytest.raises(UsageError, match=r"token 1 .* is 85 \('s'\); expected ids from 0 to 1, .* the receiver"):
        small.plan_messages([Message("system", "Hi")], sharers=[])
    narrow = PromptPlanner(bundled(QWEN), [], [], False, sharer_vocabs=[300])
    with pytest.raises(UsageError, match=r"token 1 of the prompt is 300.*from 0 to 299, the vocabulary of sharer 0"):
        narrow.plan_ids([0, 300], sharers=[0])
    assert narrow.plan_ids([0, 300], sharers=[]).num_positions == 2


# ---- malformed ids and refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "input_ids is empty"),
        ([[1, 2]], r"shape \[1, 2\]; expected a flat list"),
        ([[1], [2, 3]], "not one row"),
        ([1.0, 2.0], "values of type float64; expected integer"),
        (["a"], "expected integer token ids"),
        ([True], "values of type bool"),
        ([0, -1], r"token 1 of the prompt is -1; expected ids from 0 to 511"),
        ([QWEN_VOCAB], r"token 0 of the prompt is 512; expected ids from 0 to 511"),
        ([2**70], "expected integer token ids"),
    ],
)
def test_malformed_ids_are_refused(ids, message):
    for planner in (unaligned_planner(), aligned_planner((QWEN, None), (LLAMA, None))):
        for sharers in ([], [0]):
            with pytest.raises(UsageError, match=message):
                planner.plan_ids(ids, sharers=sharers)


def test_a_templates_refusal_reaches_the_user():
    planner = aligned_planner((QWEN, None), (GEMMA, "{{ raise_exception('System role not supported') }}"))
    with pytest.raises(C2CError, match="System role not supported"):
        planner.plan_messages([Message("system", "x")], sharers=[0])
