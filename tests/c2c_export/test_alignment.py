"""Alignment tables against the reference's published rules, applied to transformers tokenizers token by token."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from c2c_export.alignment import compile_alignment
from c2c_export.tokenizer import BundledTokenizer
from c2c_export.tokenizer_source import write_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = {
    "qwen": GOLDEN / "qwen3_from_llama_aligned" / "receiver",
    "llama": GOLDEN / "qwen3_from_llama_aligned" / "sharer",
    "gemma": GOLDEN / "llama_from_gemma3_aligned" / "sharer",
}
STRATEGIES = ["first", "longest"]


def bundle(tokenizer: PreTrainedTokenizerBase) -> BundledTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(tokenizer, "", Path(folder))
        return BundledTokenizer.load(Path(folder))


def counterpart(token: int, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, strategy: str) -> int:
    """The rules as the design page states them."""
    text = receiver.decode([token], clean_up_tokenization_spaces=False)
    unknown = sharer.unk_token_id if sharer.unk_token_id is not None else 0
    if token in receiver.all_special_ids:
        role = None
        for name in ("pad", "eos", "bos", "unk"):
            if getattr(receiver, f"{name}_token_id") == token:
                role = name
        if role is not None and getattr(sharer, f"{role}_token_id") is not None:
            return getattr(sharer, f"{role}_token_id")
        return sharer.get_vocab().get(text, unknown)
    ids = sharer.encode(text, add_special_tokens=False)
    if not ids:
        return unknown
    if strategy == "first":
        return ids[0]
    return sorted(ids, key=lambda i: -len(sharer.decode([i], clean_up_tokenization_spaces=False)))[0]


def assert_follows_the_rules(receiver, sharer, strategy, receiver_vocab):
    for tokenizer in (receiver, sharer):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    table = compile_alignment(bundle(receiver), bundle(sharer), receiver_vocab=receiver_vocab, strategy=strategy)
    assert table.dtype == np.int32
    assert table.shape == (receiver_vocab,)
    expected = [counterpart(token, receiver, sharer, strategy) for token in range(receiver_vocab)]
    assert table.tolist() == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("receiver", "sharer"), list(itertools.permutations(MODELS, 2)))
def test_every_receiver_token_goes_where_the_rules_say(receiver, sharer, strategy):
    ours, theirs = AutoTokenizer.from_pretrained(MODELS[receiver]), AutoTokenizer.from_pretrained(MODELS[sharer])
    # more ids than the tokenizer has, as most models do
    assert_follows_the_rules(ours, theirs, strategy, receiver_vocab=len(ours) + 9)


def test_a_model_may_embed_fewer_ids_than_its_tokenizer_has():
    ours, theirs = AutoTokenizer.from_pretrained(MODELS["qwen"]), AutoTokenizer.from_pretrained(MODELS["llama"])
    assert_follows_the_rules(ours, theirs, "first", receiver_vocab=2)


def words(vocab: list[str], **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True, **special)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("receiver_special", "sharer_special"),
    [
        # one receiver id with several roles: the last role decides, even if the sharer has no such token
        ({"bos_token": "<s>", "eos_token": "<s>"}, {"eos_token": "<e>", "pad_token": "<p>"}),
        ({"bos_token": "<s>", "eos_token": "<s>"}, {"bos_token": "<s>", "eos_token": "<e>"}),
        ({"eos_token": "<e>", "unk_token": "<e>"}, {"eos_token": "<e>", "unk_token": "?"}),
        # no padding token on either side
        ({"eos_token": "<e>"}, {"eos_token": "<s>"}),
        # an extra special token is looked up by its string, with and without an unknown token to fall back on
        ({"eos_token": "<e>", "extra_special_tokens": ["<p>", "<q>"]}, {"eos_token": "<e>", "unk_token": "?"}),
        ({"eos_token": "<e>", "extra_special_tokens": ["<p>", "<q>"]}, {"eos_token": "<e>"}),
    ],
)
def test_special_tokens_go_by_role_then_by_string_then_to_unknown(receiver_special, sharer_special, strategy):
    receiver = words(["?", "<s>", "<e>", "<p>", "<q>", "a", "b", "zz", " "], **receiver_special)
    sharer = words(["b", "a", "?", "<p>", "<e>", "<s>", "ccc"], **sharer_special)
    assert_follows_the_rules(receiver, sharer, strategy, receiver_vocab=12)


def test_the_longest_strategy_takes_the_earlier_of_equally_long_tokens():
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate("abcxy")} | {"xy": 5}, [("x", "y")]))
    sharer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    receiver = words(["?", "ab", "axy", "xyab", "cba"], eos_token="<e>", unk_token="?")
    table = compile_alignment(bundle(receiver), bundle(sharer), receiver_vocab=5, strategy="longest")
    assert table.tolist()[1:] == [0, 5, 5, 2]
    table = compile_alignment(bundle(receiver), bundle(sharer), receiver_vocab=5, strategy="first")
    assert table.tolist()[1:] == [0, 0, 5, 2]
