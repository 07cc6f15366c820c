"""Sliding windows shorter than prompts and gaps, end to end, against transformers on padded prompts.

In: a random Gemma3 receiver (one sliding and one full layer, with different rotary bases), a random Mistral sharer
(sliding only), a random fuser, and two recorded tokenizers. Of the two chat templates now the one is longer, now the
other; with a system turn the receiver's closes the prompt, without one it ends in padding. Expected: what the two
models, run in plain transformers over *padded* prompts, and the formulas of the paper give. There a row is a position;
the runtime has no padding rows and must know every row's position. Not covered: sharers' own alignment rules.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import CONFIGS, build_model
from torch.nn.functional import gelu, linear, rms_norm
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from c2c_export.pair import PairOptions, export_pair
from c2c_export.projector import projector_shapes
from runtime import C2CPipeline, Session

pytestmark = pytest.mark.xdist_group("sliding_window")

TOKENIZERS = Path(__file__).parents[1] / "golden" / "qwen3_from_llama_aligned"
RECEIVER_WINDOW, SHARER_WINDOW = 5, 7
MAPPING = {0: 1, 1: 0}  # receiver layer: sharer layer
CACHE_TOLERANCE, LOGITS_TOLERANCE = 1e-4, 1e-3
NUM_GENERATED = 16
# As Qwen3's, which closes the prompt with an empty thought.
RECEIVER_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nAssist well<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)

Chat = Sequence[dict[str, str]]
Floats = NDArray[np.float32]
State = dict[str, torch.Tensor]


def _turns(role: str, *contents: str) -> list[dict[str, str]]:
    """Turns of alternating speakers, of which the first is `role`."""
    if role == "system":
        return [{"role": role, "content": contents[0]}, *_turns("user", *contents[1:])]
    other = {"user": "assistant", "assistant": "user"}
    return [{"role": (role, other[role])[i % 2], "content": text} for i, text in enumerate(contents)]


CHATS = {
    "closing_padding": _turns("user", "What is the capital of France?"),
    "no_closing_padding": _turns("system", "You answer in one word.", "Which river flows through London?"),
    "three_turns": _turns("user", "Hi there!", "Hello, how can I help?", "Tell me about the GNU licence."),
}
FOLLOW_UPS = {
    "closing_padding": _turns("assistant", "Paris, it is.", "And of Spain?"),
    "no_closing_padding": _turns("assistant", "Thames.", "And through Paris?"),
    "three_turns": _turns("assistant", "It is free.", "Why?"),
}
every_chat = pytest.mark.parametrize("name", CHATS)


@dataclass(frozen=True, eq=False)
class PaddedChat:
    """A chat as both models read it, one row per position: ids [n], which of them are real bool [n], the sections."""

    receiver_ids: torch.Tensor
    sharer_ids: torch.Tensor
    receiver_real: torch.Tensor
    sharer_real: torch.Tensor
    sections: list[tuple[int, int, bool]]
    """Start, stop, fused."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What the receiver holds after the prompt, its rows of padding left out, and how it goes on."""

    keys: list[Floats]
    values: list[Floats]
    logits: Floats
    generated: list[int]


@dataclass(frozen=True, eq=False)
class Pair:
    """The pair in transformers, the receiver first wherever there are two, and the pipeline over its bundle."""

    folder: Path
    models: tuple[PreTrainedModel, PreTrainedModel]
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    projectors: list[State]

    @cached_property
    def pipe(self) -> C2CPipeline:
        options = PairOptions(
            receiver=str(self.folder / "receiver"),
            sharers=[str(self.folder / "sharer")],
            fusers=[str(self.folder / "fuser")],
            output=self.folder / "bundle",
            max_length=128,
        )
        export_pair(options, lambda _: contextlib.nullcontext())
        # two slots, so that two open sessions fill the first and the last
        return C2CPipeline.from_bundle(self.folder / "bundle", num_threads=1, num_slots=2)

    def pad(self, chat: Chat) -> PaddedChat:
        """Cut both renderings into template and message parts, and pad the shorter template part at its end."""
        rows: list[tuple[list[int], list[bool]]] = [([], []), ([], [])]
        sections = []
        parts = zip_longest(*(_parts(tokenizer, chat) for tokenizer in self.tokenizers))
        for (message, ours), (their_message, theirs) in parts:
            assert message == their_message
            start = len(rows[0][0])
            if message is not None:
                theirs = [self._counterpart(token_id) for token_id in ours]
            length = max(len(ours), len(theirs))
            for (ids, real), part, tokenizer in zip(rows, (ours, theirs), self.tokenizers, strict=True):
                num_padding = length - len(part)
                ids += [*part, *[tokenizer.pad_token_id] * num_padding]
                real += [True] * len(part) + [False] * num_padding
            sections.append((start, start + length, message is not None))
        (receiver_ids, receiver_real), (sharer_ids, sharer_real) = rows
        return PaddedChat(
            receiver_ids=torch.tensor(receiver_ids),
            sharer_ids=torch.tensor(sharer_ids),
            receiver_real=torch.tensor(receiver_real),
            sharer_real=torch.tensor(sharer_real),
            sections=sections,
        )

    def pad_ids(self, ids: Sequence[int]) -> PaddedChat:
        """Receiver ids as a prompt without padding, of which all but the last are fused."""
        real = torch.ones(len(ids), dtype=torch.bool)
        return PaddedChat(
            receiver_ids=torch.tensor(ids),
            sharer_ids=torch.tensor([self._counterpart(token_id) for token_id in ids]),
            receiver_real=real,
            sharer_real=real,
            sections=[(0, len(ids) - 1, True), (len(ids) - 1, len(ids), False)],
        )

    def _counterpart(self, token_id: int) -> int:
        receiver, sharer = self.tokenizers
        text = receiver.decode([token_id], clean_up_tokenization_spaces=False)
        return sharer.encode(text, add_special_tokens=False)[0]

    def expect(self, padded: PaddedChat) -> Expected:
        """The fused caches, the prompt's logits and the greedy continuation, section by section over padded rows."""
        receiver, sharer = self.models
        cache, sharer_cache = DynamicCache(), DynamicCache()  # without a config no row is ever dropped
        _forward(sharer, padded.sharer_ids, 0, sharer_cache, padded.sharer_real)
        for start, stop, fused in padded.sections:
            logits = _forward(receiver, padded.receiver_ids[:stop], start, cache, padded.receiver_real)
            if fused:
                self._fuse(cache, sharer_cache, slice(start, stop))
        real = padded.receiver_real
        keys = [layer.keys[0, :, real].numpy() for layer in cache.layers]
        values = [layer.values[0, :, real].numpy() for layer in cache.layers]
        prompt_logits, ids = logits.numpy(), padded.receiver_ids
        generated: list[int] = []
        while len(generated) < NUM_GENERATED:
            best = logits.topk(2).values
            assert best[0] - best[1] > LOGITS_TOLERANCE, "a tie; choose another seed"
            generated.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor(generated[-1:])])
            real = torch.cat([real, torch.tensor([True])])
            logits = _forward(receiver, ids, len(ids) - 1, cache, real)
        return Expected(keys, values, prompt_logits, generated)

    def _fuse(self, cache: DynamicCache, sharer_cache: DynamicCache, rows: slice) -> None:
        for layer, sharer_layer in MAPPING.items():
            for side in ("key", "value"):
                ours = getattr(cache.layers[layer], f"{side}s")[0, :, rows]
                theirs = getattr(sharer_cache.layers[sharer_layer], f"{side}s")[0, :, rows]
                ours += _correction(self.projectors[layer], side, theirs, ours)


def _parts(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[tuple[int | None, list[int]]]:
    """The rendered chat's ids in runs: the number of the message that they are the text of, or None for template."""
    text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    message_of: list[int | None] = [None] * len(encoded["input_ids"])
    stop = 0
    for number, message in enumerate(chat):
        start = text.index(message["content"], stop)
        stop = start + len(message["content"])
        for index, (first, last) in enumerate(encoded["offset_mapping"]):
            if last > start and first < stop:
                message_of[index] = number
    tokens = zip(message_of, encoded["input_ids"], strict=True)
    return [(number, [token_id for _, token_id in run]) for number, run in groupby(tokens, key=lambda token: token[0])]


def _forward(
    model: PreTrainedModel, ids: torch.Tensor, start: int, cache: DynamicCache, real: torch.Tensor
) -> torch.Tensor:
    """Compute the rows from `start` on, whose number is their position; the logits [V] of the last."""
    rows = torch.arange(len(ids))
    distance = rows[start:, None] - rows[None, :]
    seen = (distance >= 0) & real[: len(ids)]
    full, sliding = (
        torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        for visible in (seen, seen & (distance < model.config.sliding_window))
    )
    by_layer = {"full_attention": full, "sliding_attention": sliding}
    with torch.no_grad():
        output = model(
            input_ids=ids[None, start:],
            position_ids=rows[None, start:],
            attention_mask=by_layer if model.config.model_type == "gemma3_text" else sliding,
            past_key_values=cache,
            use_cache=True,
        )
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def _correction(state: State, side: str, sharer: torch.Tensor, receiver: torch.Tensor) -> torch.Tensor:
    """weight * proj [Ht,N,Dt] for one side of the caches, sharer [Hs,N,Ds] and receiver [Ht,N,Dt], rotated."""

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, state[f"{side}_{name}.weight"], state[f"{side}_{name}.bias"])

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        norm, w1, w2 = (state[f"{side}_{name}.blocks.0.{part}.weight"] for part in ("norm", "w1", "w2"))
        return x + linear(gelu(linear(rms_norm(x, norm.shape, norm, eps=1e-6), w1)), w2)

    x = torch.cat([cache.transpose(0, 1).flatten(1) for cache in (sharer, receiver)], dim=1)  # [N, Hs*Ds + Ht*Dt]
    hidden = block(dense(x, "in"), "mlp1")
    projected = dense(block(hidden, "proj_mlp2"), "proj_out").unflatten(1, (receiver.shape[0], receiver.shape[2]))
    weight = dense(block(hidden, "scalar_mlp2"), "scalar_head").sigmoid()  # [N,Ht]
    return (weight[:, :, None] * projected).transpose(0, 1)


def _write_model(name: str, seed: int, folder: Path, tokenizer: Path, **fields: int) -> PreTrainedModel:
    config = CONFIGS[name]()
    for field, value in fields.items():
        setattr(config, field, value)
    model = build_model(config, seed)
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("model.safetensors", "*config.json"))
    shutil.copy(tokenizer / "tokenizer_config.json", folder)
    model.save_pretrained(folder)
    return model


def _write_fuser(folder: Path, receiver_heads: tuple[int, int], sharer_heads: tuple[int, int]) -> list[State]:
    """A fuser checkpoint in the reference's layout, one projector per receiver layer, all gates open."""
    sizes = {
        "source_dim": sharer_heads[1],
        "target_dim": receiver_heads[1],
        "source_num_heads": sharer_heads[0],
        "target_num_heads": receiver_heads[0],
        "intermediate_dim": 20,
        "hidden_dim": 14,
        "num_layers": 3,
    }
    (folder / "final").mkdir(parents=True)
    model = {"is_do_alignment": True, "alignment_strategy": "first"}
    (folder / "config.json").write_text(json.dumps({"model": model}))
    links = {str(layer): [[sharer_layer, layer]] for layer, sharer_layer in MAPPING.items()}
    (folder / "final" / "projector_config.json").write_text(json.dumps({"0": {"1": links}}))
    torch.manual_seed(7)
    states = []
    for layer in MAPPING:
        description = {"class": "C2CProjector", "init_args": sizes}
        (folder / "final" / f"projector_{layer}.json").write_text(json.dumps(description))
        state = {
            tensor: torch.tensor(0.5)
            if tensor.endswith("gate_logit")
            else 0.3 * torch.randn(shape) + (1.0 if "norm" in tensor else 0.0)
            for tensor, shape in projector_shapes(**sizes).items()
        }
        torch.save({**state, "gate_temperature": torch.tensor(1.0)}, folder / "final" / f"projector_{layer}.pt")
        states.append(state)
    return states


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("sliding_window")
    receiver = _write_model(
        "gemma3", 1, folder / "receiver", TOKENIZERS / "receiver", vocab_size=512, sliding_window=RECEIVER_WINDOW
    )
    (folder / "receiver" / "chat_template.jinja").write_text(RECEIVER_TEMPLATE)
    sharer = _write_model(
        "mistral_sliding",
        2,
        folder / "sharer",
        TOKENIZERS / "sharer",
        vocab_size=700,
        head_dim=12,
        sliding_window=SHARER_WINDOW,
    )
    projectors = _write_fuser(folder / "fuser", (1, 16), (2, 12))
    tokenizers = (AutoTokenizer.from_pretrained(folder / name) for name in ("receiver", "sharer"))
    return Pair(folder, (receiver, sharer), tuple(tokenizers), projectors)


@pytest.fixture(scope="module")
def expected(pair: Pair) -> dict[str, Expected]:
    """By the name of a chat in CHATS, and by that name with "+" for the chat with its follow-up."""
    longer = {f"{name}+": [*chat, *FOLLOW_UPS[name]] for name, chat in CHATS.items()}
    return {name: pair.expect(pair.pad(chat)) for name, chat in {**CHATS, **longer}.items()}


@pytest.fixture
def other_session(pair: Pair) -> Iterator[Session]:
    """A session that has gone on for some tokens and stays open, so that the next one gets another slot."""
    with pair.pipe.prefill("Another question, of which nothing may be seen.") as session:
        session.generate(max_new_tokens=9, ignore_eos=True)
        yield session


def assert_fused(session: Session, expected: Expected) -> None:
    """The session holds the fused rows, has the logits, and goes on with the tokens (which changes it)."""
    for layer, sides in enumerate(zip(expected.keys, expected.values, strict=True)):
        for found, side, name in zip(session.kv(layer), sides, ("key", "value"), strict=True):
            np.testing.assert_allclose(found, side, rtol=0, atol=CACHE_TOLERANCE, err_msg=f"{name}.{layer}")
    np.testing.assert_allclose(session.logits, expected.logits, rtol=0, atol=LOGITS_TOLERANCE)
    generated = session.generate(max_new_tokens=NUM_GENERATED, ignore_eos=True)
    assert generated.token_ids == expected.generated


def _gaps(real: torch.Tensor) -> list[int]:
    """The lengths of the runs of padding."""
    return [len(list(run)) for is_real, run in groupby(real.tolist()) if not is_real]


@every_chat
def test_chats_are_longer_than_the_windows_and_have_gaps_on_both_sides(name: str, pair: Pair) -> None:
    padded = pair.pad(CHATS[name])
    longest_window = max(RECEIVER_WINDOW, SHARER_WINDOW)
    assert len(padded.receiver_ids) > 4 * longest_window
    assert any(stop - start > longest_window for start, stop, fused in padded.sections if fused)
    assert _gaps(padded.receiver_real)
    assert _gaps(padded.sharer_real)
    assert bool(padded.receiver_real[-1]) == (name == "no_closing_padding")


def test_gaps_before_messages_are_on_both_sides_and_some_hide_what_lies_before_them(pair: Pair) -> None:
    inner = {"receiver": set[int](), "sharer": set[int]()}
    for name, chat in CHATS.items():
        padded = pair.pad([*chat, *FOLLOW_UPS[name]])
        closing = padded.sections[-1][0]
        inner["receiver"] |= set(_gaps(padded.receiver_real[:closing]))
        inner["sharer"] |= set(_gaps(padded.sharer_real[:closing]))
    assert inner["receiver"]
    assert max(inner["receiver"]) < RECEIVER_WINDOW, "else counting rows in place of positions may go unseen"
    assert max(inner["sharer"]) >= SHARER_WINDOW


@every_chat
def test_both_models_read_the_padded_prompt_without_its_padding(name: str, pair: Pair) -> None:
    padded = pair.pad(CHATS[name])
    with pair.pipe.prefill(CHATS[name]) as session:
        assert session.token_ids.tolist() == padded.receiver_ids[padded.receiver_real].tolist()
        assert session.position_ids.tolist() == padded.receiver_real.nonzero().flatten().tolist()
        sharer = session.plan.sharers[0]
        assert sharer.ids.tolist() == padded.sharer_ids[padded.sharer_real].tolist()
        assert sharer.position_ids.tolist() == padded.sharer_real.nonzero().flatten().tolist()
        assert session.plan.num_positions == len(padded.receiver_ids)


@every_chat
def test_prompt_is_fused_as_in_transformers(name: str, pair: Pair, expected: dict[str, Expected]) -> None:
    with pair.pipe.prefill(CHATS[name]) as session:
        assert_fused(session, expected[name])


@every_chat
def test_prompt_in_another_slot_is_fused_as_in_transformers(
    name: str, pair: Pair, expected: dict[str, Expected], other_session: Session
) -> None:
    with pair.pipe.prefill(CHATS[name]) as session:
        other_session.generate(max_new_tokens=2, ignore_eos=True)
        assert_fused(session, expected[name])


@every_chat
def test_chat_after_append_is_fused_as_in_transformers(name: str, pair: Pair, expected: dict[str, Expected]) -> None:
    with pair.pipe.prefill(CHATS[name]) as session:
        session.generate(max_new_tokens=12, ignore_eos=True)  # rows behind the prompt, to be written over
        session.append(FOLLOW_UPS[name])
        assert_fused(session, expected[f"{name}+"])


@every_chat
def test_chat_after_append_in_another_slot_is_fused_as_in_transformers(
    name: str, pair: Pair, expected: dict[str, Expected], other_session: Session
) -> None:
    with pair.pipe.prefill(CHATS[name]) as session:
        other_session.append("Another one.")
        session.append(FOLLOW_UPS[name])
        other_session.generate(max_new_tokens=2, ignore_eos=True)
        assert_fused(session, expected[f"{name}+"])


@pytest.mark.parametrize("num_first", [3, 30])
def test_ids_appended_within_a_window_are_fused_as_in_transformers(
    num_first: int, pair: Pair, other_session: Session
) -> None:
    # Turns lie a template apart, more than the sharer's window; here its new tokens see rows that it keeps.
    ids = pair.tokenizers[0].encode("Which river flows through London, and which through Paris?")[:40]
    with pair.pipe.prefill(ids[:num_first]) as session:
        session.append(ids[num_first:])
        other_session.generate(max_new_tokens=2, ignore_eos=True)
        assert_fused(session, pair.expect(pair.pad_ids(ids)))


def test_two_sessions_go_on_in_turns_as_in_transformers(pair: Pair, expected: dict[str, Expected]) -> None:
    names = ("closing_padding", "no_closing_padding")
    with pair.pipe.prefill(CHATS[names[0]]) as first, pair.pipe.prefill(CHATS[names[1]]) as second:
        streams = [session.stream(max_new_tokens=NUM_GENERATED, ignore_eos=True) for session in (first, second)]
        chunks = list(zip(*streams, strict=True))
    for number, name in enumerate(names):
        assert [token for chunk in chunks for token in chunk[number].token_ids] == expected[name].generated


@every_chat
def test_receiver_alone_equals_transformers_with_its_own_masks(name: str, pair: Pair, other_session: Session) -> None:
    receiver, tokenizer = pair.models[0], pair.tokenizers[0]
    text = tokenizer.apply_chat_template(list(CHATS[name]), tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    num_prompt = len(ids)
    for step in range(NUM_GENERATED):
        with torch.no_grad():
            logits = receiver(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if step == 0:
            prompt_logits = logits.numpy()
        ids.append(int(logits.argmax()))
    with pair.pipe.prefill(CHATS[name], fuse=False) as session:
        assert session.token_ids.tolist() == ids[:num_prompt]
        np.testing.assert_allclose(session.logits, prompt_logits, rtol=0, atol=LOGITS_TOLERANCE)
        generated = session.generate(max_new_tokens=NUM_GENERATED, ignore_eos=True)
        assert generated.token_ids == ids[num_prompt:]
