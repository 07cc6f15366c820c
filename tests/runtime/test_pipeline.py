"""The pipeline against transformers on the receiver alone, and against the fusion formulas written out in torch."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from recorded_pairs import (
    ALIGNED,
    CLOSING_PADDING,
    PAIRS,
    PARALLEL,
    SEQUENTIAL,
    UNALIGNED,
    PipelineOf,
    every,
    tokenizer_of,
    unaligned,
)
from transformers import AutoModelForCausalLM, DynamicCache

from c2c_export.bundle import read_manifest, write_manifest
from runtime import BundleError, C2CPipeline, UsageError

IDS = [5, 77, 300, 12, 511, 8, 64, 9, 250, 33, 401]
QUESTION = "What is the capital of France?"
GREEDY = {"ignore_eos": True}

Array = np.ndarray[Any, Any]


every_pair = every(*PAIRS)


@cache
def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def decode(name: str, ids: Sequence[int]) -> str:
    return tokenizer_of(name).decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def generate_with_transformers(name: str, ids: Sequence[int], num_tokens: int, **options: Any) -> list[int]:
    row = torch.tensor([list(ids)])
    with torch.no_grad():
        out = model_of(GOLDEN / name / "receiver").generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=num_tokens, **options
        )
    return out[0, len(ids) :].tolist()


# --- the receiver alone ---


@every_pair
@pytest.mark.parametrize("alone", [{"fuse": False}, {"sharers": []}, {"fuse": False, "sharers": [0]}], ids=str)
def test_receiver_alone_equals_transformers_generate(name: str, alone: Any, recorded_pipeline: PipelineOf):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    text = tokenizer_of(name).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer_of(name)(text, add_special_tokens=False).input_ids
    pipe = recorded_pipeline(name)
    expected = generate_with_transformers(name, ids, 24)
    out = pipe.generate(messages, **alone, max_new_tokens=24, **GREEDY)
    assert out.token_ids == expected
    assert out.text == decode(name, expected)
    assert pipe.generate(input_ids=ids, **alone, max_new_tokens=24, **GREEDY).token_ids == expected
    with pipe.prefill(messages, **alone) as session:
        assert session.plan.sharers == {}
        assert session.position_ids.tolist() == list(range(len(ids)))


@unaligned
def test_repetition_penalty_equals_transformers(name: str, recorded_pipeline: PipelineOf):
    expected = generate_with_transformers(name, IDS, 24, repetition_penalty=1.7)
    assert expected != generate_with_transformers(name, IDS, 24)
    out = recorded_pipeline(name).generate(
        input_ids=IDS, fuse=False, max_new_tokens=24, repetition_penalty=1.7, **GREEDY
    )
    assert out.token_ids == expected


# --- the fusion, written out (docs of C2C: arXiv 2510.03215, section 3, and its reference's projector) ---


class Projector:
    def __init__(self, folder: Path, index: int) -> None:
        arguments = json.loads((folder / "final" / f"projector_{index}.json").read_text())["init_args"]
        self._num_proj_blocks = arguments["num_layers"] - 2
        self._num_heads = arguments["target_num_heads"]
        self._state = torch.load(folder / "final" / f"projector_{index}.pt", weights_only=True)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self._state[f"{name}.weight"].T + self._state[f"{name}.bias"]

    def _mlp(self, name: str, x: torch.Tensor, num_blocks: int) -> torch.Tensor:
        for block in range(num_blocks):
            weights = [self._state[f"{name}.blocks.{block}.{part}.weight"] for part in ("norm", "w1", "w2")]
            norm, w1, w2 = weights
            normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * norm
            inner = normed @ w1.T
            x = x + (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ w2.T
        return x

    def correction(self, kind: str, sharer: torch.Tensor, receiver: torch.Tensor) -> torch.Tensor:
        """[H,N,D] caches of one layer in, what is added to the receiver's out."""
        if self._state[f"{kind}_gate_logit"] <= 0:
            return torch.zeros_like(receiver)
        flat = torch.cat([cache.transpose(0, 1).flatten(1) for cache in (sharer, receiver)], dim=-1)
        hidden = self._mlp(f"{kind}_mlp1", self._linear(f"{kind}_in", flat), 1)
        projected = self._mlp(f"{kind}_proj_mlp2", hidden, self._num_proj_blocks)
        projected = self._linear(f"{kind}_proj_out", projected).unflatten(-1, (self._num_heads, -1))
        weight = torch.sigmoid(self._linear(f"{kind}_scalar_head", self._mlp(f"{kind}_scalar_mlp2", hidden, 1)))
        return (weight[..., None] * projected).transpose(0, 1)


Caches = list[dict[str, torch.Tensor]]


def prefill_with_transformers(folder: Path, ids: Sequence[int]) -> Caches:
    cache = DynamicCache()
    with torch.no_grad():
        model_of(folder)(torch.tensor([list(ids)]), past_key_values=cache)
    return [{"key": layer.keys[0], "value": layer.values[0]} for layer in cache.layers]


def fuse_with_torch(receiver: Caches, sharers: Iterable[tuple[Path, Caches]], sequential: bool) -> Caches:
    fused = [dict(layer) for layer in receiver]
    for folder, sharer in sharers:
        seen = [dict(layer) for layer in (fused if sequential else receiver)]
        layer_map = json.loads((folder / "final" / "projector_config.json").read_text())["0"]["1"]
        for layer, [[source, projector]] in layer_map.items():
            for kind in ("key", "value"):
                correction = Projector(folder, projector).correction(kind, sharer[source][kind], seen[int(layer)][kind])
                fused[int(layer)][kind] = fused[int(layer)][kind] + correction
    return fused


def generate_after(folder: Path, caches: Caches, last_id: int, num_tokens: int) -> tuple[Array, Caches, list[int]]:
    """Logits after `last_id`, caches with its row, and the greedy tokens."""
    cache = DynamicCache()
    for index, layer in enumerate(caches):
        cache.update(layer["key"][None], layer["value"][None], index)
    tokens = [last_id]
    first_logits, with_last = None, None
    with torch.no_grad():
        while len(tokens) <= num_tokens:
            logits = model_of(folder)(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1]
            if first_logits is None:
                first_logits = logits.numpy()
                with_last = [{"key": layer.keys[0].clone(), "value": layer.values[0].clone()} for layer in cache.layers]
            tokens.append(int(logits.argmax()))
    assert first_logits is not None
    assert with_last is not None
    return first_logits, with_last, tokens[1:]


def assert_fused_as_written_out(
    pipe: C2CPipeline, name: str, sharer_ids: dict[int, list[int]], sequential: bool, **options: Any
) -> None:
    pair = GOLDEN / name
    receiver = prefill_with_transformers(pair / "receiver", IDS[:-1])
    folders = sorted(pair.glob("sharer*")), sorted(pair.glob("fuser*"))
    sharers = [
        (folders[1][number], prefill_with_transformers(folders[0][number], ids[:-1]))
        for number, ids in sharer_ids.items()
    ]
    fused = fuse_with_torch(receiver, sharers, sequential)
    logits, caches, tokens = generate_after(pair / "receiver", fused, IDS[-1], 16)
    with pipe.prefill(IDS, **options) as session:
        for layer, expected in enumerate(caches):
            for found, kind in zip(session.kv(layer), ("key", "value"), strict=True):
                np.testing.assert_allclose(found, expected[kind].numpy(), rtol=0, atol=1e-4, err_msg=f"{kind}.{layer}")
        np.testing.assert_allclose(session.logits, logits, rtol=0, atol=1e-3)
        assert session.generate(max_new_tokens=16, **GREEDY).token_ids == tokens


@every(PARALLEL, SEQUENTIAL)
@pytest.mark.parametrize("sharers", [[0], [1], [0, 1], [1, 0], [1, 1], None], ids=str)
def test_chosen_sharers_fuse_as_the_formulas_say(name: str, sharers: Any, recorded_pipeline: PipelineOf):
    chosen = sorted(set(sharers)) if sharers is not None else [0, 1]
    assert_fused_as_written_out(
        recorded_pipeline(name), name, dict.fromkeys(chosen, IDS), name == SEQUENTIAL, sharers=sharers
    )


@every(UNALIGNED)
def test_one_sharer_fuses_as_the_formulas_say(name: str, recorded_pipeline: PipelineOf):
    assert_fused_as_written_out(recorded_pipeline(name), name, {0: IDS}, False)


@every(CLOSING_PADDING, ALIGNED)
def test_sharers_of_an_aligned_pair_read_the_counterparts_of_raw_ids(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    table = np.load(pipe.bundle.alignment_file(0))
    assert_fused_as_written_out(pipe, name, {0: table[IDS].tolist()}, False)


@every(PARALLEL, SEQUENTIAL)
def test_the_two_modes_and_sets_of_sharers_differ(name: str, recorded_pipeline: PipelineOf):
    # Else the comparisons above would say nothing.
    pipe = recorded_pipeline(name)
    seen = []
    for sharers in ([], [0], [1], [0, 1]):
        with pipe.prefill(IDS, sharers=sharers) as session:
            seen.append(session.logits)
    with recorded_pipeline(name).prefill(IDS) as session:
        np.testing.assert_array_equal(session.logits, seen[-1])
    assert min(np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]) > 1e-2


# --- sampling ---


@every(UNALIGNED, ALIGNED)
def test_a_seed_repeats_its_tokens_and_another_gives_others(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)

    def sample(seed: int | None) -> list[int]:
        return pipe.generate(QUESTION, max_new_tokens=24, temperature=1.5, seed=seed, **GREEDY).token_ids

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in (1, 2, 3, None, None)}) == 5


@unaligned
def test_top_k_of_one_is_greedy(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    greedy = pipe.generate(QUESTION, max_new_tokens=16, **GREEDY).token_ids
    assert pipe.generate(QUESTION, max_new_tokens=16, temperature=3.0, top_k=1, **GREEDY).token_ids == greedy


# --- where a generation ends ---


@pytest.fixture
def with_stop_ids(recorded_bundle: Callable[[str], Path], tmp_path: Path) -> Callable[[str, list[int]], C2CPipeline]:
    """A pair's pipeline whose manifest names other stop ids."""

    def load(name: str, stop_ids: list[int]) -> C2CPipeline:
        folder = Path(shutil.copytree(recorded_bundle(name), tmp_path / name))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["stop_ids"] = stop_ids
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return C2CPipeline.from_bundle(folder, num_slots=1, num_threads=1)

    return load


@every(UNALIGNED, CLOSING_PADDING)
def test_a_stop_id_ends_the_generation_and_stays_out_of_the_text(
    name: str, recorded_pipeline: PipelineOf, with_stop_ids: Callable[[str, list[int]], C2CPipeline]
):
    greedy = recorded_pipeline(name).generate(QUESTION, max_new_tokens=16, **GREEDY).token_ids
    stop = max(set(greedy), key=greedy.index)  # the token that first appears last
    end = greedy.index(stop)
    assert end > 0
    never = next(token for token in range(512) if token not in greedy)
    pipe = with_stop_ids(name, [never, stop])
    out = pipe.generate(QUESTION, max_new_tokens=40)
    assert (out.token_ids, out.finish_reason) == (greedy[: end + 1], "stop")
    assert out.text == decode(name, greedy[:end])
    # On the last token that may be generated, it is still a stop.
    assert pipe.generate(QUESTION, max_new_tokens=end + 1).finish_reason == "stop"
    assert pipe.generate(QUESTION, max_new_tokens=end).finish_reason == "length"
    ignored = pipe.generate(QUESTION, max_new_tokens=16, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == (greedy, "length")
    assert ignored.text == decode(name, greedy)


@every(UNALIGNED, ALIGNED)
def test_a_stop_string_ends_the_text_before_it(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    whole = pipe.generate(QUESTION, max_new_tokens=24, **GREEDY)
    assert whole.text == decode(name, whole.token_ids)
    tried = 0
    for start in range(1, len(whole.text) - 2, 3):
        stop = whole.text[start : start + 2]
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        tried += 1
        for argument in (stop, [stop], ("never there", stop)):
            chunks = list(pipe.stream(QUESTION, max_new_tokens=24, stop=argument, **GREEDY))
            out = chunks[-1].generation
            assert out is not None
            assert out.text == "".join(chunk.text for chunk in chunks) == whole.text[: whole.text.index(stop)]
            assert out.finish_reason == "stop"
            assert out.token_ids == whole.token_ids[: len(out.token_ids)]
            assert stop in decode(name, out.token_ids)
            assert stop not in decode(name, out.token_ids[:-1])
    assert tried >= 3


@unaligned
def test_a_stop_string_found_only_at_the_end_is_a_stop(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    # The text ends in the beginning of one stop string, inside of which another is complete.
    texts = [pipe.generate(QUESTION, max_new_tokens=count, **GREEDY).text for count in range(4, 16)]
    ends = [text[-4:] for text in texts]
    count = next(
        count
        for count, (text, end) in enumerate(zip(texts, ends, strict=True), 4)
        if text.index(end[-3:]) == len(text) - 3 and "\N{REPLACEMENT CHARACTER}" not in end
    )
    whole = texts[count - 4]
    stop = [whole[-4:] + "never there", whole[-3:]]
    out = pipe.generate(QUESTION, max_new_tokens=count, stop=stop, **GREEDY)
    assert (out.text, out.finish_reason) == (whole[:-3], "stop")


@unaligned
def test_a_stop_string_does_not_end_with_the_tokens(name: str, recorded_pipeline: PipelineOf):
    out = recorded_pipeline(name).generate(QUESTION, max_new_tokens=8, stop="never there", **GREEDY)
    assert (out.finish_reason, len(out.token_ids)) == ("length", 8)


@unaligned
@pytest.mark.parametrize("wrong", [0, -1, 1.5, "3", True], ids=repr)
def test_max_new_tokens_out_of_range_is_refused(name: str, wrong: Any, recorded_pipeline: PipelineOf):
    with pytest.raises(UsageError, match="max_new_tokens"):
        recorded_pipeline(name).generate(input_ids=IDS, max_new_tokens=wrong)


# --- capacity ---


@unaligned
@pytest.mark.parametrize("fuse", [True, False])
def test_prompt_and_tokens_may_fill_the_capacity_but_not_exceed_it(
    name: str, fuse: bool, recorded_pipeline: PipelineOf
):
    pipe = recorded_pipeline(name)
    capacity = pipe.bundle.manifest.max_length
    ids = [int(token) for token in np.random.default_rng(0).integers(3, 512, capacity + 1)]
    with pytest.raises(UsageError, match=rf"{capacity + 1} tokens.*capacity is {capacity}"):
        pipe.prefill(ids, fuse=fuse)
    for num_prompt in (capacity, capacity - 1, capacity - 5):
        # The last token's own row is never needed.
        room = capacity - num_prompt + 1
        prompt = ids[:num_prompt]
        with pytest.raises(UsageError, match=rf"{num_prompt} prompt tokens.*capacity.*at most {room}"):
            pipe.generate(input_ids=prompt, fuse=fuse, max_new_tokens=room + 1)
        out = pipe.generate(input_ids=prompt, fuse=fuse, max_new_tokens=room, **GREEDY)
        assert len(out.token_ids) == room
        unlimited = pipe.generate(input_ids=prompt, fuse=fuse, **GREEDY)
        assert (unlimited.token_ids, unlimited.finish_reason) == (out.token_ids, "length")
        if not fuse:
            assert out.token_ids == generate_with_transformers(name, prompt, room)
        with pipe.prefill(prompt, fuse=fuse) as session:
            parts = [session.generate(max_new_tokens=1, **GREEDY).token_ids[0] for _ in range(room)]
            assert parts == out.token_ids
            with pytest.raises(UsageError, match="capacity"):
                session.generate(max_new_tokens=1)


def messages_of(pipe: C2CPipeline, num_tokens: int) -> list[dict[str, str]]:
    """A chat that takes so many tokens of the receiver."""
    for length in range(1, 4 * num_tokens):
        messages = [{"role": "user", "content": "aq" * (length // 2) + "q" * (length % 2)}]
        try:
            with pipe.prefill(messages) as session:
                found = len(session.token_ids)
        except UsageError:
            break
        if found == num_tokens:
            return messages
    raise AssertionError(f"no prompt of {num_tokens} tokens found")


@every(CLOSING_PADDING)
def test_a_closing_padding_row_takes_the_last_row_of_the_cache(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    capacity = pipe.bundle.manifest.max_length
    messages = messages_of(pipe, capacity - 1)
    content = messages[0]["content"]
    with pytest.raises(UsageError, match=f"{capacity + 1} tokens"):
        pipe.prefill([{"role": "user", "content": content + "Z"}])

    with pipe.prefill(messages) as session:
        plan = session.plan
        assert plan.closing_padding_id is not None
        caches = [session.kv(layer) for layer in range(pipe.bundle.manifest.receiver.num_layers)]
        receiver = model_of(GOLDEN / name / "receiver")

        def logits_of(token: int, position: int, sees_itself: bool) -> Array:
            cache = DynamicCache()
            for index, pair in enumerate(caches):
                key, value = (torch.from_numpy(array)[None] for array in pair)
                cache.update(key, value, index)
            mask = torch.zeros(1, 1, 1, capacity)
            mask[..., -1] = 0.0 if sees_itself else torch.finfo(torch.float32).min
            with torch.no_grad():
                out = receiver(
                    torch.tensor([[token]]),
                    position_ids=torch.tensor([[position]]),
                    past_key_values=cache,
                    attention_mask=mask,
                )
            return out.logits[0, -1].numpy()

        padding = logits_of(plan.closing_padding_id, plan.num_positions - 1, sees_itself=False)
        np.testing.assert_allclose(session.logits, padding, rtol=0, atol=1e-3)
        first = int(padding.argmax())
        second = int(logits_of(first, plan.num_positions, sees_itself=True).argmax())
        with pytest.raises(UsageError, match="at most 2"):
            session.generate(max_new_tokens=3)
        assert session.generate(**GREEDY).token_ids == [first, second]


# --- what is refused, and what is not ---


@every(UNALIGNED, PARALLEL)
@pytest.mark.parametrize("wrong", [[2], [-1], [0, 7], [True], ["0"], [0.0], [None]], ids=str)
def test_unknown_sharers_are_refused(name: str, wrong: Any, recorded_pipeline: PipelineOf):
    with pytest.raises(UsageError, match=r"sharer .*this bundle has sharers 0 to"):
        recorded_pipeline(name).generate(input_ids=IDS, sharers=wrong)


@unaligned
def test_either_messages_or_ids_are_wanted(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    for call in (pipe.generate, pipe.stream):
        for arguments in ({}, {"messages": QUESTION, "input_ids": IDS}):
            with pytest.raises(UsageError, match="either messages or input_ids"):
                call(**arguments)


@unaligned
def test_an_unknown_option_is_refused_by_name(name: str, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    for call in (pipe.generate, pipe.stream):
        with pytest.raises(UsageError, match=r"unknown option temprature; the sampling options are temperature, top_k"):
            call(QUESTION, max_new_tokens=1, temprature=1.0)


@every(UNALIGNED, ALIGNED)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_numpy_ids_are_read_like_a_list(name: str, dtype: Any, recorded_pipeline: PipelineOf):
    pipe = recorded_pipeline(name)
    expected = pipe.generate(input_ids=IDS, max_new_tokens=8, **GREEDY).token_ids
    array = np.array(IDS, dtype=dtype)
    assert pipe.generate(input_ids=array, max_new_tokens=8, **GREEDY).token_ids == expected
    assert pipe.generate(input_ids=list(array), max_new_tokens=8, **GREEDY).token_ids == expected
    with pipe.prefill(array) as session:
        assert session.generate(max_new_tokens=8, **GREEDY).token_ids == expected


@unaligned
@pytest.mark.parametrize(
    "wrong",
    [[], np.array([], dtype=np.int64), [512], [-1], [3, 4.5], np.array([1.0, 2.0]), np.array([[3, 4]]), [[3, 4]]],
    ids=repr,
)
def test_ids_that_are_no_row_of_known_ids_are_refused(name: str, wrong: Any, recorded_pipeline: PipelineOf):
    with pytest.raises(UsageError):
        recorded_pipeline(name).generate(input_ids=wrong, max_new_tokens=1)


@unaligned
@pytest.mark.parametrize("wrong", ["", "  \n", [], [{"role": "user", "content": ""}], [{"role": "user"}]], ids=repr)
def test_an_empty_or_malformed_chat_is_refused(name: str, wrong: Any, recorded_pipeline: PipelineOf):
    with pytest.raises(UsageError):
        recorded_pipeline(name).generate(wrong, max_new_tokens=1)


@unaligned
def test_an_engine_that_the_bundle_lacks_is_refused(name: str, recorded_bundle: Callable[[str], Path]):
    for engine, precision in (("tensorrt", "fp32"), ("ort-cpu", "int8")):
        with pytest.raises(UsageError, match=rf"no engine {engine} in {precision}; it has ort-cpu-fp32"):
            C2CPipeline.from_bundle(recorded_bundle(name), engine, precision)
    for option in ("num_slots", "num_threads"):
        for wrong in (0, -1, 1.5, "2", True):
            with pytest.raises(UsageError, match=f"{option} is {wrong!r}, expected an integer of at least 1"):
                C2CPipeline.from_bundle(recorded_bundle(name), **{option: wrong})


@unaligned
def test_a_damaged_bundle_is_refused_by_the_files_name(
    name: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    folder = Path(shutil.copytree(recorded_bundle(name), tmp_path / name))
    weights = folder / "graphs" / "receiver.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"receiver\.onnx\.data.*changed"):
        C2CPipeline.from_bundle(folder)
    weights.unlink()
    with pytest.raises(BundleError, match=r"receiver\.onnx\.data.*missing"):
        C2CPipeline.from_bundle(folder)


@unaligned
def test_a_manifest_with_more_ids_than_the_engine_has_logits_is_refused(
    name: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    folder = Path(shutil.copytree(recorded_bundle(name), tmp_path / name))
    manifest = read_manifest(folder)
    receiver = manifest.receiver.model_copy(update={"vocab_size": manifest.receiver.vocab_size + 1})
    write_manifest(folder, manifest.model_copy(update={"receiver": receiver}))
    with pytest.raises(BundleError, match=r"manifest\.json: field receiver\.vocab_size is 513, expected at most 512,"):
        C2CPipeline.from_bundle(folder)


@unaligned
@pytest.mark.parametrize("other", [-1, 1])
def test_a_manifest_with_another_capacity_than_the_engine_is_refused(
    other: int, name: str, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    folder = Path(shutil.copytree(recorded_bundle(name), tmp_path / name))
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"max_length": manifest.max_length + other}))
    with pytest.raises(
        BundleError, match=rf"manifest\.json: field max_length is {256 + other}, expected 256, the rows"
    ):
        C2CPipeline.from_bundle(folder)


@every_pair
def test_timings_add_up(name: str, recorded_pipeline: PipelineOf):
    spent = recorded_pipeline(name).generate(QUESTION, max_new_tokens=4, **GREEDY).timings
    assert min(spent.sharer_prefill, spent.fuse) >= 0
    assert min(spent.receiver_prefill, spent.ttft, spent.decode) > 0
    assert spent.ttft >= spent.sharer_prefill + spent.receiver_prefill + spent.fuse
    alone = recorded_pipeline(name).generate(QUESTION, fuse=False, max_new_tokens=1).timings
    assert alone.fuse == 0
    assert alone.decode >= 0
