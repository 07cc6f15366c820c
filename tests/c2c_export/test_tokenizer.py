"""Bundled tokenizers against the transformers tokenizers they were written from, and where chat templates come from."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from c2c_export.errors import BundleError, C2CError, UsageError
from c2c_export.tokenizer import BundledTokenizer
from c2c_export.tokenizer_source import choose_chat_template, load_tokenizer, write_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = [
    GOLDEN / "qwen3_from_llama_aligned" / "receiver",
    GOLDEN / "qwen3_from_llama_aligned" / "sharer",
    GOLDEN / "llama_from_gemma3_aligned" / "sharer",
]
TEXTS = [
    "",
    " leading and trailing ",
    "line\r\nends\n\n\n  and\ttabs",
    "naïve café e\u0301 北京是中国的首都吗？",
    "👩‍🚀🚀 flags 🇸🇮",
    "<|im_start|>user\nhi<|im_end|> <bos><eos><unk> <|im_start <|begin_of_text|>x<|eot_id|>",
]


def bundle(tokenizer: PreTrainedTokenizerBase, folder: Path, template: str = "{{ messages }}") -> BundledTokenizer:
    write_tokenizer(tokenizer, template, folder)
    return BundledTokenizer.load(folder)


def assert_same(bundled: BundledTokenizer, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    got = bundled.encode(text)
    assert got.ids == expected["input_ids"]
    assert got.offsets == expected["offset_mapping"]
    for skip in (False, True):
        assert bundled.decode(got.ids, skip_special_tokens=skip) == tokenizer.decode(got.ids, skip_special_tokens=skip)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    pieces = ["▁", "▁hello", "▁wor", "ld", "h", "e", "l", "o", "w", "r", "d"]
    vocab = [("<unk>", 0.0), *((piece, -float(i)) for i, piece in enumerate(pieces, 1))]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=True
    )


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_a_bundled_tokenizer_encodes_and_decodes_as_transformers(model, text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert_same(bundle(load_tokenizer(model), tmp_path), tokenizer, text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.one_of(st.text(max_size=8), st.sampled_from(["<|im_end|>", "<|im_start|>", " "])), max_size=6))
def test_any_text_is_encoded_and_decoded_as_by_transformers(texts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    assert_same(bundle(tokenizer, tmp_path), tokenizer, "".join(texts))


@pytest.mark.parametrize("text", ["hello world", " hello  world ?", "x</s>hello", "hello . hello , hello n't"])
def test_a_sentencepiece_tokenizer_that_cleans_up_spaces_is_reproduced(text, tmp_path):
    tokenizer = sentencepiece_like()
    bundled = bundle(tokenizer, tmp_path)
    assert bundled.special.clean_up_spaces
    assert_same(bundled, tokenizer, text)


def test_clean_up_follows_transformers_rule_for_words(tmp_path):
    words = ["<unk>", "it", "'s", "does", "n't", "work", ".", ",", "?", "!", "'", "'m", "'ve", "'re"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    for text in ("it 's . it does n't work , it ? !", "it ' it 'm it 've it 're"):
        assert_same(bundle(tokenizer, tmp_path), tokenizer, text)


def test_clean_up_is_ignored_for_byte_pair_encodings_as_in_transformers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0], clean_up_tokenization_spaces=True)
    bundled = bundle(tokenizer, tmp_path)
    assert not bundled.special.clean_up_spaces
    assert_same(bundled, tokenizer, "what ? a . b")


def test_special_tokens_and_vocabulary_size_are_those_of_transformers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[1])
    bundled = bundle(tokenizer, tmp_path, template="{{ bos_token }}\r\n")
    special = bundled.special
    assert (special.padding_id, special.end_id, special.begin_id, special.unknown_id) == (1, 4, 0, None)
    assert set(special.special_ids) == set(tokenizer.all_special_ids)
    assert special.template_variables == tokenizer.special_tokens_map
    assert bundled.vocab_size == len(tokenizer) == 700
    assert bundled.chat_template == "{{ bos_token }}\r\n"


def test_extra_special_tokens_and_tokens_added_later_are_kept(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0], extra_special_tokens=["<|tool|>"])
    tokenizer.add_tokens([AddedToken("wombat", single_word=True, lstrip=True)])
    bundled = bundle(tokenizer, tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|tool|>") in bundled.special.special_ids
    assert bundled.vocab_size == len(tokenizer) == 514
    assert_same(bundled, tokenizer, "a wombat, wombats <|tool|> x")


def test_a_tokenizer_without_padding_takes_its_end_token(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[1])
    tokenizer.pad_token = None
    bundled = bundle(tokenizer, tmp_path)
    assert tokenizer.pad_token is None
    assert bundled.special.padding_id == bundled.special.end_id == 4
    assert bundled.special.template_variables["pad_token"] == "<|eot_id|>"
    assert 1 not in bundled.special.special_ids


def test_padding_and_truncation_of_the_source_are_not_active(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert bundle(tokenizer, tmp_path).encode("abcdefgh").ids == tokenizer.encode("abcdefgh", add_special_tokens=False)


def test_an_id_outside_of_the_vocabulary_decodes_to_nothing(tmp_path):
    assert bundle(AutoTokenizer.from_pretrained(MODELS[0]), tmp_path).decode([100_000]) == ""


def test_a_tokenizer_that_splits_special_tokens_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0], split_special_tokens=True)
    with pytest.raises(C2CError, match="split_special_tokens is set, expected unset"):
        write_tokenizer(tokenizer, "", tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens.json", "chat_template.jinja"])
def test_a_missing_file_is_named(name, tmp_path):
    bundle(AutoTokenizer.from_pretrained(MODELS[0]), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing"):
        BundledTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json: not a tokenizer"),
        ("special_tokens.json", b"[", "special_tokens.json: the whole file"),
        ("special_tokens.json", b'{"padding_id": "x"}', "special_tokens.json: padding_id"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: unreadable"),
    ],
)
def test_a_broken_file_is_named(name, content, message, tmp_path):
    bundle(AutoTokenizer.from_pretrained(MODELS[0]), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        BundledTokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(C2CError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(C2CError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_broken_source_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(C2CError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (tmp_path / "merges.txt").write_text("#version\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}')
    with pytest.raises(C2CError, match="CTRLTokenizer has no fast form"):
        load_tokenizer(tmp_path)


def test_the_users_template_wins_over_the_fusers_over_the_models(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    given_file, trained_file = tmp_path / "given.jinja", tmp_path / "trained.jinja"
    given_file.write_text("given")
    trained_file.write_text("trained")
    assert choose_chat_template(tokenizer, "m", given_file, trained_file) == ("given", f"file {given_file}")
    assert choose_chat_template(tokenizer, "m", None, trained_file) == ("trained", f"file {trained_file}")
    assert choose_chat_template(tokenizer, "m", None, None) == (tokenizer.chat_template, "model")


def test_of_several_templates_the_default_one_is_taken():
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    tokenizer.chat_template = {"tool_use": "tools", "default": "plain"}
    assert choose_chat_template(tokenizer, "m", None, None) == ("plain", "model")
    tokenizer.chat_template = {"tool_use": "tools", "rag": "documents"}
    with pytest.raises(C2CError, match="its chat templates are rag, tool_use, expected one named default"):
        choose_chat_template(tokenizer, "m", None, None)


def test_a_model_without_a_template_gets_the_references():
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]

    template, origin = choose_chat_template(tokenizer, "some/model", None, None)
    assert origin == "reference default"
    # as it stands in the reference, line ends and indents included
    assert (
        template
        == """{% for message in messages %}{% if message['role'] == 'user' %}### Human: {{ message['content'] }}{% elif message['role'] == 'assistant' %}### Assistant: {{ message['content'] }}{% endif %}{% if not loop.last %}
    {% endif %}{% endfor %}{% if add_generation_prompt %}
    ### Assistant:{% endif %}"""  # noqa: E501
    )

    template, origin = choose_chat_template(tokenizer, "Jacaranda/UlizaLlama3", None, None)
    assert origin == "reference default"
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Yo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_template_file_that_cannot_be_used_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    path = tmp_path / "t.jinja"
    with pytest.raises(UsageError, match=r"t\.jinja: no such file; expected a chat template"):
        choose_chat_template(tokenizer, "m", path, None)
    path.write_bytes(b"ab\xff")
    with pytest.raises(UsageError, match=r"t\.jinja: not UTF-8 text \(byte 2\)"):
        choose_chat_template(tokenizer, "m", path, None)
    path.write_text("{% for m in messages %}\n{{ m. }}{% endfor %}")
    with pytest.raises(C2CError, match=r"t\.jinja: not a valid Jinja template: line 2: expected name or number"):
        choose_chat_template(tokenizer, "m", path, None)
