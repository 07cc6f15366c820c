"""Bundles: written and read back equal, movable, and refused by name when anything in them is not as it was written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2c_export.bundle import (
    SCHEMA_VERSION,
    Bundle,
    EngineRecord,
    GraphRecord,
    LayerLink,
    Manifest,
    ModelRecord,
    SharerRecord,
    TensorSpec,
    hash_folder,
    write_manifest,
)
from c2c_export.errors import BundleError
from runtime import C2CPipeline


def make_manifest(files: dict[str, str]) -> Manifest:
    model = ModelRecord(
        source="a/model [x]",
        architecture="LlamaForCausalLM",
        num_layers=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=40,
        sliding_window=None,
        max_position_embeddings=128,
        chat_template="model",
        sources={"config.json": "0" * 64},
    )
    graph = GraphRecord(
        path="graphs/receiver.onnx",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens")),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 1, 40)),),
        num_nodes=3,
        num_bytes=100,
        passes={"fuse_rms_norms": 5},
    )
    link = LayerLink(receiver_layer=1, sharer_layer=0, projector=0, key_gate_open=True, value_gate_open=False)
    sharer = SharerRecord(
        model=model.model_copy(update={"sliding_window": 5}),
        fuser_source="fuser",
        fuser_sources={"config.json": "1" * 64},
        alignment_strategy="longest",
        links=(link,),
        sharer_graph=graph,
        fuser_graph=None,
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tool_versions={"c2c-export": "0.1.0"},
        max_length=64,
        aligned=True,
        fusion_mode="sequential",
        stop_ids=(1, 2),
        receiver=model,
        receiver_graph=graph,
        sharers=(sharer,),
        engines={"ort-cpu-fp32": EngineRecord(target="ort-cpu", precision="fp32", graphs={"receiver": graph.path})},
        files=files,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "a.bundle"
    for name, content in (("graphs/receiver.onnx", b"graph"), ("graphs/receiver.onnx.data", b"\0" * 1000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "alignment").mkdir()
    np.save(folder / "alignment" / "sharer0.npy", np.arange(40, dtype=np.int32))
    for name in TOKENIZER_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_manifest(folder, make_manifest(hash_folder(folder)))
    return folder


TOKENIZER_FILES = tuple(
    f"tokenizers/receiver/{name}" for name in ("tokenizer.json", "special_tokens.json", "chat_template.jinja")
)


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def edit_manifest(root: Path, edit: Callable[[Any], object]) -> None:
    path = root / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_manifest_is_read_back_as_it_was_written(root: Path) -> None:
    opened = Bundle.open(root)
    assert opened.manifest == make_manifest(hash_folder(root))
    assert set(opened.manifest.files) == {
        "alignment/sharer0.npy",
        "graphs/receiver.onnx",
        "graphs/receiver.onnx.data",
        *TOKENIZER_FILES,
    }
    assert opened.file("graphs/receiver.onnx").read_bytes() == b"graph"
    assert opened.alignment_file(0).is_file()
    assert opened.tokenizer_folder() == root / "tokenizers" / "receiver"
    with pytest.raises(BundleError, match=r"tokenizers/sharer1/tokenizer\.json"):
        opened.tokenizer_folder(1)


def test_a_bundle_may_be_moved_and_opened_by_a_relative_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = root.parent / "elsewhere" / "renamed"
    moved.parent.mkdir()
    shutil.move(root, moved)
    assert Bundle.open(str(moved)).manifest == make_manifest(hash_folder(moved))
    monkeypatch.chdir(moved)
    assert Bundle.open(".").file("graphs/receiver.onnx") == moved / "graphs/receiver.onnx"


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/passwd", "graphs/../../x.onnx", "graphs\\x.onnx", ""])
def test_a_path_that_leaves_the_bundle_is_refused(root: Path, path: str) -> None:
    edit_manifest(root, lambda content: content["engines"]["ort-cpu-fp32"]["graphs"].update(receiver=path))
    assert "engines.ort-cpu-fp32.graphs.receiver" in refusal(root)


@pytest.mark.parametrize("name", ["graphs/receiver.onnx", "graphs/receiver.onnx.data"])
def test_a_file_that_the_manifest_does_not_list_is_not_used(root: Path, name: str) -> None:
    edit_manifest(root, lambda content: content["files"].pop(name))
    with pytest.raises(BundleError, match="lists no hash"):
        Bundle.open(root).file("graphs/receiver.onnx")


@pytest.mark.parametrize("graphs", [{}, {"receiver": "graphs/receiver.onnx", "fuser7": "graphs/receiver.onnx"}])
def test_an_engine_with_other_graphs_than_the_bundle_is_refused(root: Path, graphs: dict[str, str]) -> None:
    edit_manifest(root, lambda content: content["engines"]["ort-cpu-fp32"].update(graphs=graphs))
    assert "engine ort-cpu-fp32" in refusal(root)


def test_a_manifest_nested_too_deeply_is_refused(root: Path) -> None:
    (root / "manifest.json").write_text("[" * 200_000)
    assert "manifest.json" in refusal(root)


@given(data=st.data())
def test_any_changed_byte_of_any_file_is_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("bundle")
    content = data.draw(st.binary(min_size=1, max_size=300))
    (root / "graph.onnx").write_bytes(content)
    write_manifest(root, make_manifest(hash_folder(root)))
    where = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[where] ^= data.draw(st.integers(1, 255))
    Bundle.open(root)
    (root / "graph.onnx").write_bytes(changed)
    assert str(root / "graph.onnx") in refusal(root)


@pytest.mark.parametrize("name", ["graphs/receiver.onnx", "graphs/receiver.onnx.data", "alignment/sharer0.npy"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "longer", "folder"])
def test_a_missing_or_changed_file_is_named(root: Path, name: str, damage: str) -> None:
    path = root / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "longer":
        path.write_bytes(content + b"\0")
    elif damage == "folder":
        path.mkdir()
    message = refusal(root)
    assert message.startswith(f"{path}: ")
    assert ("missing" if damage in ("removed", "folder") else "changed") in message


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, None, "1", [1]])
def test_another_schema_version_is_refused(root: Path, version: object) -> None:
    edit_manifest(root, lambda content: content.update(schema_version=version))
    message = refusal(root)
    assert str(root / "manifest.json") in message
    assert repr(version) in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b"null", b"{}", b'{"schema_version": 1}'])
def test_a_broken_manifest_is_refused(root: Path, content: bytes) -> None:
    (root / "manifest.json").write_bytes(content)
    assert str(root / "manifest.json") in refusal(root)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda content: content.update(surprise=1), "surprise"),
        (lambda content: content["sharers"][0]["links"][0].update(surprise=1), "sharers.0.links.0.surprise"),
        (lambda content: content.pop("stop_ids"), "stop_ids"),
        (lambda content: content.update(fusion_mode="mixed"), "fusion_mode"),
        (lambda content: content["receiver"].update(num_layers="many"), "receiver.num_layers"),
    ],
)
def test_an_unknown_missing_or_wrong_field_is_named(root: Path, edit: Callable[[Any], object], field: str) -> None:
    edit_manifest(root, edit)
    message = refusal(root)
    assert str(root / "manifest.json") in message
    assert f"field {field}:" in message


def test_what_is_not_a_bundle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for name in ("empty", "file", "missing", "file/below"):
        message = refusal(tmp_path / name)
        assert str(tmp_path / name) in message
        assert "c2c-export pair" in message


def test_an_exported_bundle_runs_from_any_place_and_locks_all_its_files(
    recorded_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    original = recorded_bundle("qwen3_from_llama_aligned")
    moved = Path(shutil.copytree(original, tmp_path / "a folder" / "moved"))
    manifest = Bundle.open(moved).manifest
    files = {path.relative_to(moved).as_posix() for path in moved.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    prompt = {"input_ids": [5, 6, 7, 8, 9], "fuse": False, "max_new_tokens": 4, "ignore_eos": True}
    results = [
        C2CPipeline.from_bundle(place, num_slots=1, num_threads=1).generate(**prompt) for place in (original, moved)
    ]
    assert results[0].token_ids == results[1].token_ids
    for name in manifest.files:
        with (moved / name).open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))
        with pytest.raises(BundleError, match="changed") as caught:
            C2CPipeline.from_bundle(moved)
        assert str(moved / name) in str(caught.value)
        shutil.copy(original / name, moved / name)
    Bundle.open(moved)
