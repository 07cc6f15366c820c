"""Exporting a pair: each wrong input gets its one clear error before anything is traced; nothing half-written stays."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from c2c_export.bundle import Bundle
from c2c_export.errors import C2CError, UsageError
from c2c_export.pair import PairOptions, export_pair
from runtime import C2CPipeline

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CLI = "from c2c_export.cli import main; main()"


class Pair:
    """A writable copy of a recorded pair, and an output that does not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(shutil.copytree(GOLDEN / "qwen3_from_qwen2", folder / "pair"))
        (folder / "out").mkdir()
        self.output = folder / "out" / "a.bundle"
        self.steps: list[str] = []
        self.options: dict[str, Any] = {
            "receiver": str(self.folder / "receiver"),
            "sharers": [str(self.folder / "sharer")],
            "fusers": [str(self.folder / "fuser")],
            "output": self.output,
            "max_length": 64,
        }

    def export(self, **options: Any) -> Path:
        @contextlib.contextmanager
        def step(description: str) -> Iterator[None]:
            self.steps.append(description)
            yield

        return export_pair(PairOptions(**{**self.options, **options}), step)

    def refusal(self, kind: type[C2CError] = C2CError, **options: Any) -> str:
        """The message with which the export is refused: one or two lines, before any tracing, nothing left behind."""
        before = snapshot(self.output.parent)
        with pytest.raises(C2CError) as caught:
            self.export(**options)
        assert type(caught.value) is kind
        assert not [step for step in self.steps if "fuser" in step and step.startswith("Tracing")]
        assert snapshot(self.output.parent) == before
        message = str(caught.value)
        assert len(message.splitlines()) <= 2
        assert len(message) < 700
        return message

    def edit_json(self, name: str, edit: Callable[[Any], object]) -> None:
        path = self.folder / name
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    def edit_projector(self, index: int, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = self.folder / "fuser" / "final" / f"projector_{index}.pt"
        state = torch.load(path, weights_only=True)
        edit(state)
        torch.save(state, path)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def cli_arguments(pair: Pair, *more: str) -> list[str]:
    folder = pair.folder
    models = ["--receiver", folder / "receiver", "--sharer", folder / "sharer", "--fuser", folder / "fuser"]
    return [str(part) for part in ("pair", *models, "-o", pair.output, "--max-length", 64, *more)]


def run_cli(arguments: list[str], before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{CLI}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# Options


def test_every_sharer_needs_its_fuser(pair: Pair) -> None:
    sharer = pair.options["sharers"][0]
    assert "2 sharer(s) and 1 fuser(s)" in pair.refusal(UsageError, sharers=[sharer, sharer])
    assert "0 sharer(s)" in pair.refusal(UsageError, sharers=[])
    assert "2 fuser(s)" in pair.refusal(UsageError, fusers=pair.options["fusers"] * 2)


def test_a_capacity_that_the_engine_does_not_take_is_refused_before_anything_is_traced(pair: Pair) -> None:
    for model in ("receiver", "sharer"):
        pair.edit_json(f"{model}/config.json", lambda config: config.update(max_position_embeddings=200_000))
    assert "capacity 140000: ort-cpu takes up to 131072 rows" in pair.refusal(UsageError, max_length=140_000)
    assert pair.steps == ["Reading models and fusers"]


def test_a_graph_that_cannot_be_lowered_is_refused_before_the_next_is_traced(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("c2c_export.bundle_writer.RECEIVER_PASSES", ())
    message = pair.refusal()
    assert message.startswith(f"{pair.options['receiver']}: layer ")
    assert "its norm is no RMSNormalization" in message
    assert [step.split(" (")[0] for step in pair.steps] == ["Reading models and fusers", "Tracing the receiver"]


@pytest.mark.parametrize("max_length", [15, 0, -1])
def test_a_capacity_that_is_too_small_is_refused(pair: Pair, max_length: int) -> None:
    assert f"--max-length {max_length}" in pair.refusal(UsageError, max_length=max_length)


def test_an_unknown_fusion_mode_is_refused(pair: Pair) -> None:
    assert "--fusion-mode both" in pair.refusal(UsageError, fusion_mode="both")


def test_options_for_sharers_are_refused_where_there_are_none(pair: Pair) -> None:
    assert "--fusion-mode parallel" in pair.refusal(UsageError, sharers=[], fusers=[], fusion_mode="parallel")
    template = pair.folder / "receiver" / "chat_template.jinja"
    message = pair.refusal(UsageError, sharers=[], fusers=[], sharer_chat_templates=[template])
    assert "1 --sharer-chat-template given for 0 sharers" in message


def test_chat_templates_are_given_for_no_sharer_or_for_each(pair: Pair) -> None:
    template = pair.folder / "receiver" / "chat_template.jinja"
    assert "2 --sharer-chat-template" in pair.refusal(UsageError, sharer_chat_templates=[template, template])


def test_a_missing_or_broken_chat_template_is_refused(pair: Pair) -> None:
    missing, broken = pair.folder / "missing.jinja", pair.folder / "broken.jinja"
    broken.write_text("{% for message in messages %}")
    assert str(missing) in pair.refusal(UsageError, receiver_chat_template=missing)
    assert str(broken) in pair.refusal(sharer_chat_templates=[broken])


def test_an_existing_output_is_kept_unless_told_otherwise(pair: Pair) -> None:
    pair.output.mkdir()
    (pair.output / "manifest.json").write_text('{"schema_version": 0}')
    assert "--overwrite" in pair.refusal(UsageError)


def test_overwriting_replaces_bundles_only(pair: Pair) -> None:
    pair.output.mkdir()
    (pair.output / "precious.txt").write_text("mine")
    assert "not a bundle" in pair.refusal(UsageError, overwrite=True)
    file = pair.output.parent / "file"
    file.write_text("mine")
    assert "not a bundle" in pair.refusal(UsageError, overwrite=True, output=file)


def test_an_output_that_cannot_be_written_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "missing", tmp_path / "file", Path("/proc")):
        assert str(parent) in pair.refusal(UsageError, output=parent / "a.bundle")


# Models and fusers


def test_sources_that_do_not_exist_are_refused(pair: Pair) -> None:
    for field, value in (("receiver", "/no/model"), ("sharers", ["/no/model"]), ("fusers", ["/no/model"])):
        assert "/no/model" in pair.refusal(UsageError, **{field: value})
    assert "config.json" in pair.refusal(receiver=str(pair.folder))
    assert "config.json" in pair.refusal(fusers=[str(pair.folder / "receiver")])


@pytest.mark.parametrize("model", ["receiver", "sharer"])
def test_an_unsupported_architecture_is_refused(pair: Pair, model: str) -> None:
    pair.edit_json(f"{model}/config.json", lambda c: c.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    message = pair.refusal()
    assert "GPT2LMHeadModel" in message
    assert "Qwen3ForCausalLM" in message


def test_a_fuser_of_other_shapes_is_refused_by_file_and_field(pair: Pair) -> None:
    message = pair.refusal(fusers=[str(GOLDEN / "llama_from_gemma3_aligned" / "fuser")])
    assert "llama_from_gemma3_aligned" in message
    # models the other way round
    options = {"receiver": pair.options["sharers"][0], "sharers": [pair.options["receiver"]]}
    assert str(pair.folder / "fuser") in pair.refusal(**options)


@pytest.mark.parametrize(("links", "named"), [([["9", 0]], "receiver"), ([["0", 3]], "sharer")])
def test_a_layer_map_out_of_range_is_refused(pair: Pair, links: list[Any], named: str) -> None:
    layers = {receiver: [[sharer, 0]] for receiver, sharer in links}
    pair.edit_json("fuser/final/projector_config.json", lambda c: c["0"].update({"1": layers}))
    message = pair.refusal()
    assert "projector_config.json" in message
    assert f"{named} layer" in message


def test_nan_in_a_projector_is_refused_by_tensor(pair: Pair) -> None:
    pair.edit_projector(1, lambda state: state["value_in.weight"].__setitem__((0, 0), float("nan")))
    message = pair.refusal()
    assert "projector_1.pt" in message
    assert "value_in.weight" in message


def test_code_in_a_projector_is_not_run(pair: Pair, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "code-was-run"),)

    (pair.folder / "fuser/final/projector_0.pt").write_bytes(pickle.dumps(Code()))
    assert "projector_0.pt" in pair.refusal()
    assert not (tmp_path / "code-was-run").exists()


def test_aligned_and_unaligned_fusers_do_not_mix(pair: Pair) -> None:
    other = Path(shutil.copytree(pair.folder / "fuser", pair.folder / "fuser2"))
    pair.edit_json("fuser2/config.json", lambda c: c["model"].update(is_do_alignment=True))
    message = pair.refusal(sharers=pair.options["sharers"] * 2, fusers=[*pair.options["fusers"], str(other)])
    assert "is_do_alignment" in message
    assert str(other) in message


def test_a_broken_tokenizer_is_refused(pair: Pair) -> None:
    (pair.folder / "sharer" / "tokenizer.json").write_text("{")
    assert str(pair.folder / "sharer") in pair.refusal()


def test_a_broken_generation_config_is_refused_before_anything_is_traced(pair: Pair) -> None:
    (pair.folder / "receiver" / "generation_config.json").write_text("{")
    assert "generation_config.json" in pair.refusal()


def test_an_unaligned_sharer_must_know_the_receivers_tokens(pair: Pair) -> None:
    pair.edit_json("sharer/config.json", lambda c: c.update(vocab_size=100))
    assert "vocabulary of 100" in pair.refusal()


def _poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [_poison, _truncate, _remove])
def test_bad_weights_are_refused_and_an_old_bundle_is_kept(pair: Pair, damage: Callable[[Path], None]) -> None:
    pair.output.mkdir()
    (pair.output / "manifest.json").write_text('{"schema_version": 0, "an": "old bundle"}')
    damage(pair.folder / "receiver")
    assert str(pair.folder / "receiver") in pair.refusal(overwrite=True)


# The command, end to end


def test_wrong_usage_exits_with_2_and_a_failure_with_1(pair: Pair) -> None:
    usage = run_cli(cli_arguments(pair, "--max-length", "3"))
    pair.edit_json("fuser/final/projector_config.json", lambda c: c["0"].update({"1": {"77": [[0, 0]]}}))
    failure = run_cli(cli_arguments(pair))
    for result, code, text in ((usage, 2, "--max-length 3"), (failure, 1, "projector_config.json")):
        assert result.returncode == code, result.stderr
        assert "error:" in result.stderr
        assert text in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
    assert not list(pair.output.parent.iterdir())


@pytest.mark.parametrize("limit", [1000, 300_000], ids=["tokenizer", "weights"])
def test_when_writing_fails_the_old_bundle_is_kept_and_nothing_else_is_left(pair: Pair, limit: int) -> None:
    pair.output.mkdir()
    (pair.output / "manifest.json").write_text('{"schema_version": 0, "an": "old bundle"}')
    before = snapshot(pair.output.parent)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = run_cli(cli_arguments(pair, "--overwrite"), before=limited)
    assert result.returncode == 1, result.stderr
    assert f"error: {pair.output}" in result.stderr
    assert "Traceback" not in result.stderr
    assert snapshot(pair.output.parent) == before


def test_a_full_disk_is_named(pair: Pair) -> None:
    disk = pair.output.parent
    if shutil.which("mount") is None or os.getuid() != 0:
        pytest.skip("needs root, to mount a tiny disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        with pytest.raises(C2CError, match="the disk is full") as caught:
            pair.export()
        assert str(pair.output) in str(caught.value)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_interrupted_export_leaves_nothing(pair: Pair) -> None:
    command = [sys.executable, "-c", CLI, *cli_arguments(pair)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("Tracing the receiver"):
                assert list(pair.output.parent.iterdir())  # the partial bundle
                process.send_signal(signal.SIGINT)
                break
        seen.append(process.stderr.read())
        process.wait(timeout=60)
    assert process.returncode in (1, 130), "".join(seen)
    assert "Traceback" not in "".join(seen)
    assert not list(pair.output.parent.iterdir())


def test_overwriting_replaces_a_bundle_and_a_sharer_may_give_the_values_of_its_first_layer_alone(pair: Pair) -> None:
    # one link, its K gate closed: of the sharer nothing is left but an embedding, a norm and one projection
    pair.edit_json("fuser/final/projector_config.json", lambda c: c["0"].update({"1": {"2": [[0, 1]]}}))
    pair.edit_projector(
        1, lambda state: state.update(key_gate_logit=torch.tensor(0.0), value_gate_logit=torch.tensor(0.5))
    )
    pair.output = pair.output.with_name("with [x] in its name")
    pair.output.mkdir()
    (pair.output / "manifest.json").write_text('{"schema_version": 0}')
    (pair.output / "old.txt").write_text("of the old bundle")

    result = run_cli(cli_arguments(pair, "--overwrite"))
    assert result.returncode == 0, result.stderr
    assert f"Wrote {pair.output}." in result.stderr
    assert [path.name for path in pair.output.parent.iterdir()] == [pair.output.name]
    assert not (pair.output / "old.txt").exists()
    sharer = Bundle.open(pair.output).manifest.sharers[0]
    assert sharer.sharer_graph is not None
    assert {spec.name for spec in sharer.sharer_graph.inputs} == {"input_ids", "write_index", "past_value.0"}

    pipeline = C2CPipeline.from_bundle(pair.output, num_slots=2, num_threads=1)
    ids = [5, 90, 17, 240, 33]
    with pipeline.prefill(ids) as fused, pipeline.prefill(ids, fuse=False) as alone:
        for layer in range(4):
            for kind, (with_sharer, without) in enumerate(zip(fused.kv(layer), alone.kv(layer), strict=True)):
                changed = np.abs(with_sharer - without).max(axis=(0, 2)) > 1e-4
                # rows of the fused section change where the link writes, and the last row wherever it read them
                expected = (layer == 2 and kind == 1), layer > 2
                assert changed[:-1].tolist() == [expected[0]] * 4
                assert bool(changed[-1]) is expected[1]


# One model


def test_a_bundle_of_one_model_is_that_model(pair: Pair) -> None:
    run = run_cli(
        [*("pair", "--receiver", str(pair.folder / "receiver")), *("-o", str(pair.output), "--max-length", "128")]
    )
    assert run.returncode == 0, run.stderr
    pipeline = C2CPipeline.from_bundle(pair.output, num_threads=1)
    assert pipeline.bundle.manifest.sharers == ()
    assert pipeline.engine_choice.record.graphs.keys() == {"receiver"}

    ids = [17, 301, 45, 8, 112]
    model = AutoModelForCausalLM.from_pretrained(pair.folder / "receiver", dtype=torch.float32)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    for fuse in (True, False):
        found = pipeline.generate(input_ids=ids, max_new_tokens=8, ignore_eos=True, fuse=fuse)
        assert found.token_ids == expected
        assert found.timings.sharer_prefill == found.timings.fuse == 0.0
    with pipeline.prefill("What is the capital of France?") as session:
        assert [section.fused for section in session.plan.sections] == [False]
        session.generate(max_new_tokens=2, ignore_eos=True)
        session.append("And of Spain?")
    with pytest.raises(UsageError, match="this bundle has no sharers"):
        pipeline.prefill(ids, sharers=[0])

    shown = run_cli(["inspect", str(pair.output)])
    assert shown.returncode == 0, shown.stderr
    assert "one model" in shown.stdout
