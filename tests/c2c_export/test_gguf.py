"""Converting `.gguf` files: a tiny Llama written with the gguf library comes back with its weights and tokens."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import build_model
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel

from c2c_export.errors import C2CError
from c2c_export.gguf import cache_folder, convert_gguf
from c2c_export.models import load_weights, read_config, shape_of
from c2c_export.sources import resolve_model
from c2c_export.tokenizer_source import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "golden" / "qwen3_from_qwen2" / "receiver" / "tokenizer.json"
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=False,
        )
    )


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(TOKENIZER.read_text())
    tokens = sorted(vocabulary["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"]: token["content"] for token in vocabulary["added_tokens"]}
    names = {index: name for name, index in tokens} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names[index] for index in range(config.vocab_size)])
    writer.add_token_types([3 if index in special else 1 for index in range(config.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _gguf_values(name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{TENSORS[part]}.weight"
    return f"{TENSORS[stem]}.weight"


def _gguf_values(name: str, values: np.ndarray, config: LlamaConfig) -> np.ndarray:
    # llama.cpp rotates pairs of neighbours instead of halves, so it stores the rows of q and k in another order
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads:
        rows = values.shape[0]
        values = values.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
    return np.ascontiguousarray(values.astype(np.float16 if "mlp" in name else np.float32))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_weights_shape_and_tokens_survive_the_conversion(model: PreTrainedModel, file: Path, cache: Path) -> None:
    folder = resolve_model(str(file))
    assert cache in folder.parents
    config = read_config(folder)
    shape = shape_of(config)
    assert (shape.architecture, shape.num_layers, shape.num_key_value_heads) == ("LlamaForCausalLM", 2, 2)
    assert (shape.head_dim, shape.vocab_size, shape.max_position_embeddings) == (8, 512, 128)
    converted = load_weights(folder, config)
    found = converted.state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor.half().float() if "mlp" in name else tensor
        assert torch.equal(found[name], expected), name
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=0.05)

    original = AutoTokenizer.from_pretrained(TOKENIZER.parent)
    tokenizer = load_tokenizer(folder)
    text = "What is the capital of France? <|im_start|> é🙂"
    assert tokenizer(text, add_special_tokens=False).input_ids == original(text, add_special_tokens=False).input_ids
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (2, "{{ messages[0]['content'] }}")


def test_a_file_is_converted_once_whatever_its_name_and_place(file: Path, cache: Path, tmp_path: Path) -> None:
    folder = convert_gguf(file)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(file.read_bytes())
    assert convert_gguf(moved) == convert_gguf(file) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["empty", "header", "half", "last_bytes", "other_file", "wrong_version"])
def test_a_damaged_file_is_refused_and_leaves_nothing_in_the_cache(
    file: Path, cache: Path, tmp_path: Path, damage: str
) -> None:
    content = file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(
        {
            "empty": b"",
            "header": content[:20],
            "half": content[: len(content) // 2],
            "last_bytes": content[:-100],
            "other_file": b"PK\x03\x04" * 100,
            "wrong_version": content[:4] + b"\x63\0\0\0" + content[8:],
        }[damage]
    )
    with pytest.raises(C2CError) as caught:
        resolve_model(str(damaged))
    assert str(damaged) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert not list((cache / "gguf").iterdir())


def test_a_cache_that_cannot_be_written_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("a file where the cache should be")
    monkeypatch.setenv("C2C_EXPORT_CACHE", str(tmp_path / "occupied" / "cache"))
    with pytest.raises(C2CError) as caught:
        convert_gguf(file)
    assert str(tmp_path / "occupied") in str(caught.value)
    assert "C2C_EXPORT_CACHE" in str(caught.value)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("C2C_EXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", os.sep + "home-of-a-user")
    assert cache_folder() == Path("/home-of-a-user/.cache/c2c-export")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/c2c-export")
    monkeypatch.setenv("C2C_EXPORT_CACHE", "/own")
    assert cache_folder() == Path("/own")
