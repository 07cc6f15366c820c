"""What the research code is asked is the recorded prompt, padding and all; where its checkout is there, it is run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from c2c_export.bench.measure import MeasuredPrompt
from c2c_export.bench.options import ReferenceOptions
from c2c_export.bench.reference import (
    compare,
    find_sources,
    make_request,
    padded_prompt,
    run_reference,
    seconds_allowed,
)
from c2c_export.bench.reference_process import ReferencePrompt, ReferenceRequest, ReferenceResult, ReferenceRun
from c2c_export.bench.report import PhaseTimes, PromptRecord
from c2c_export.errors import C2CError, UsageError
from runtime import C2CPipeline, Message
from runtime.prompt import ModelTokens, Plan

GOLDEN = Path(__file__).parents[2] / "golden"
UNALIGNED, ALIGNED, CLOSING_PADDING = "qwen3_from_qwen2", "llama_from_gemma3_aligned", "qwen3_from_llama_aligned"
TWO_SHARERS = "two_sharers_sequential"
CHECKOUT = os.environ.get("C2C_REFERENCE")
SECONDS = 300.0

PipelineOf = Callable[[str], C2CPipeline]
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="C2C_REFERENCE names no checkout of thu-nics/C2C")


def times(ttft: float, milliseconds: float) -> PhaseTimes:
    return PhaseTimes(
        ttft=ttft,
        ttft_range=(ttft, ttft),
        sharer_prefill=0.0,
        receiver_prefill=ttft,
        fuse=0.0,
        rest=0.0,
        decode_ms_per_token=milliseconds,
        decode_ms_quartiles=(milliseconds, milliseconds),
        tokens_per_second=1000 / milliseconds,
    )


def plan_of(ids: list[int]) -> Plan:
    tokens = ModelTokens(np.array(ids), np.arange(len(ids)))
    return Plan((), tokens, {}, num_positions=len(ids), closing_padding_id=None)


def prompt_record(ttft: float, milliseconds: float) -> PromptRecord:
    return PromptRecord(
        asked_tokens=8,
        receiver_tokens=8,
        sharer_tokens={0: 7},
        fused_tokens=7,
        c2c=times(ttft, milliseconds),
        receiver_alone=times(ttft, milliseconds),
        memory=None,
    )


@pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (ALIGNED, CLOSING_PADDING)]
)
def test_an_aligned_prompt_is_padded_as_it_was_recorded(pair: str, recorded_pipeline: PipelineOf):
    pipeline = recorded_pipeline(pair)
    expected = load_file(GOLDEN / pair / "expected.safetensors")
    cases = json.loads((GOLDEN / pair / "case.json").read_text())["cases"]
    for number, case in enumerate(cases):
        plan = pipeline.make_plan([Message(**message) for message in case["messages"]], [], (0,))
        prompt = padded_prompt(plan)
        assert [(length, mask != -1) for length, mask in case["sections"]] == prompt.sections
        for row, model in enumerate(("receiver", "sharer")):
            real = ~expected[f"{number}.{model}_padding_mask"][0].astype(bool)
            np.testing.assert_array_equal(np.array(prompt.attention_masks[row]).astype(bool), real)
            np.testing.assert_array_equal(np.array(prompt.ids[row])[real], expected[f"{number}.{model}_ids"][0][real])


@pytest.mark.xdist_group(UNALIGNED)
def test_sources_are_the_manifests_unless_given(recorded_pipeline: PipelineOf):
    pipeline = recorded_pipeline(UNALIGNED)
    manifest = pipeline.bundle.manifest
    folder = GOLDEN / UNALIGNED
    given = ReferenceOptions(Path(), None, str(folder / "receiver"), [str(folder / "sharer")], [str(folder / "fuser")])
    plan = pipeline.make_plan(None, [1, 2, 3], (0,))
    sources = find_sources(given, manifest)
    request = make_request(given, sources, manifest.fusion_mode, [plan], threads=3, new_tokens=4, repeats=2)
    assert (request.receiver, request.sharers) == (str(folder / "receiver"), [str(folder / "sharer")])
    assert (request.threads, request.new_tokens, request.repeats) == (3, 4, 2)
    assert request.prompts[0].ids == [[1, 2, 3], [1, 2, 3]]
    assert request.prompts[0].sections == [(2, True), (1, False)]
    moved = manifest.model_copy(update={"receiver": manifest.receiver.model_copy(update={"source": "/gone"})})
    with pytest.raises(UsageError, match=r"/gone.*--receiver"):
        find_sources(ReferenceOptions(Path()), moved)


def test_ratios_are_the_research_codes_times_over_ours():
    run = ReferenceRun([3.0, 2.0, 9.0], [1.0, 0.5, 1.0], [1.5, 1.0, 1.5], [0.2, 0.1, 0.3, 0.4, 0.1], [5, 6, 9, 8])
    result = ReferenceResult({"torch": "2"}, 7, [run])
    measured = MeasuredPrompt(plan_of([1, 2]), prompt_record(1.5, 50.0), [5, 6, 7, 8])
    (found,) = compare(result, [measured], "C2C").prompts
    assert found.fuse == pytest.approx(0.5)
    assert (found.ttft, found.ttft_range) == (3.0, (2.0, 9.0))
    assert found.decode_ms_per_token == pytest.approx(200.0)
    assert found.decode_ms_quartiles == pytest.approx((100.0, 300.0))
    assert (found.ttft_ratio, found.decode_ratio) == (pytest.approx(2.0), pytest.approx(4.0))
    assert (found.equal_tokens, found.new_tokens) == (2, 4)


@pytest.mark.xdist_group(UNALIGNED)
def test_a_checkout_that_fails_is_an_error_with_its_reason(recorded_pipeline: PipelineOf, tmp_path: Path):
    pipeline, folder = recorded_pipeline(UNALIGNED), GOLDEN / UNALIGNED
    given = ReferenceOptions(
        tmp_path, None, str(folder / "receiver"), [str(folder / "sharer")], [str(folder / "fuser")]
    )
    plan = pipeline.make_plan(None, [1, 2, 3], (0,))
    manifest = pipeline.bundle.manifest
    sources = find_sources(given, manifest)
    request = make_request(given, sources, manifest.fusion_mode, [plan], threads=1, new_tokens=2, repeats=1)
    with pytest.raises(C2CError, match="the research code failed: ModuleNotFoundError: No module named 'rosetta'"):
        run_reference(request, None, SECONDS)
    with pytest.raises(C2CError, match="/bin/true: gave no result, expected a Python interpreter"):
        run_reference(request, Path("/bin/true"), SECONDS)
    with pytest.raises(C2CError, match="cannot be run as an interpreter: Permission denied"):
        run_reference(request, GOLDEN / "README.md", SECONDS)


REQUEST = ReferenceRequest(
    checkout="C2C",
    receiver="receiver",
    sharers=[],
    fusers=[],
    fusion_mode="parallel",
    threads=1,
    new_tokens=3,
    repeats=2,
    prompts=[ReferencePrompt([[1, 2]], [[1, 1]], [(2, False)])],
)
RUN = {
    "ttft": [1.0, 1.0],
    "sharer_prefill": [0.1, 0.1],
    "receiver_prefill": [0.2, 0.2],
    "steps": [0.1] * 4,
    "token_ids": [5, 6, 7],
}
RESULT: dict[str, Any] = {"versions": {}, "peak_bytes": 1, "runs": [RUN]}


def interpreter_that_prints(text: str, folder: Path) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\ncat > /dev/null\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)
    return path


def test_a_whole_result_is_read(tmp_path: Path):
    result = run_reference(REQUEST, interpreter_that_prints(json.dumps(RESULT), tmp_path), SECONDS)
    assert result.runs == [ReferenceRun(**RUN)]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("no JSON", "gave no result"),
        ([RESULT], "gave no result"),
        ({**RESULT, "runs": None}, "gave no result"),
        ({**RESULT, "runs": [{"ttft": [1.0]}]}, "gave no result"),
        ({**RESULT, "runs": []}, "ran 0 prompts, expected 1"),
        ({**RESULT, "runs": [{**RUN, "token_ids": [5]}]}, r"generated 1 tokens after 2 .* expected 3"),
        ({**RESULT, "runs": [{**RUN, "steps": []}]}, r"0 steps in all; expected 3, 2 and 4"),
        ({**RESULT, "runs": [{**RUN, "ttft": [1.0]}]}, r"timed 1 times"),
    ],
)
def test_less_than_a_whole_result_is_an_error(result: Any, message: str, tmp_path: Path):
    text = result if isinstance(result, str) else json.dumps(result)
    with pytest.raises(C2CError, match=message):
        run_reference(REQUEST, interpreter_that_prints(text, tmp_path), SECONDS)


def test_a_research_code_that_does_not_end_is_killed_and_told(tmp_path: Path):
    path, pid = tmp_path / "python", tmp_path / "pid"
    path.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    path.chmod(0o755)
    with pytest.raises(C2CError, match=r"^C2C: the research code was not done after 0 minutes, .* --prompt-tokens"):
        run_reference(REQUEST, path, 0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_the_research_code_may_take_fifty_times_as_long_as_the_bundle_and_load_for_half_an_hour():
    measured = [
        MeasuredPrompt(plan_of([1, 2]), prompt_record(ttft, milliseconds), [5])
        for ttft, milliseconds in ((1.0, 100.0), (2.0, 300.0))
    ]
    # Three runs each, one of them not counted: 1 + 10 * 0.1 and 2 + 10 * 0.3 seconds.
    assert seconds_allowed(measured, new_tokens=11, repeats=2) == pytest.approx(1800 + 50 * 3 * (2 + 5))


@pytest.mark.xdist_group(UNALIGNED)
def test_a_process_that_dies_while_it_looks_for_models_is_an_error(
    recorded_pipeline: PipelineOf, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("c2c_export.bench.reference._send_sources", os.path.basename)  # fails on its arguments
    with pytest.raises(C2CError, match="the process that looks for its models died"):
        find_sources(ReferenceOptions(Path()), recorded_pipeline(UNALIGNED).bundle.manifest)


@needs_checkout
@pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (UNALIGNED, ALIGNED, TWO_SHARERS)]
)
def test_the_research_code_gives_the_same_tokens(pair: str, recorded_pipeline: PipelineOf):
    assert CHECKOUT is not None
    pipeline, folder = recorded_pipeline(pair), GOLDEN / pair
    manifest = pipeline.bundle.manifest
    given = ReferenceOptions(
        Path(CHECKOUT),
        None,
        str(folder / "receiver"),
        [str(path) for path in sorted(folder.glob("sharer*"))],
        [str(path) for path in sorted(folder.glob("fuser*"))],
    )
    sharers = tuple(range(len(manifest.sharers)))
    question = "Which country is the city of Porto in?"
    if manifest.aligned:
        plan = pipeline.make_plan([Message("user", question)], [], sharers)
        ours = pipeline.generate(question, max_new_tokens=6, ignore_eos=True).token_ids
    else:
        ids = list(range(40, 60))
        plan = pipeline.make_plan(None, ids, sharers)
        ours = pipeline.generate(input_ids=ids, max_new_tokens=6, ignore_eos=True).token_ids
    sources = find_sources(given, manifest)
    request = make_request(given, sources, manifest.fusion_mode, [plan], threads=1, new_tokens=6, repeats=1)
    (run,) = run_reference(request, None, SECONDS).runs
    assert 0 < run.receiver_prefill[0] < run.ttft[0]
    assert 0 < run.sharer_prefill[0] < run.ttft[0]
    assert min(run.steps) > 0
    # From the second token on the research code attends to an aligned prompt's padding, which it was not trained to.
    assert run.token_ids[:1] == ours[:1] if manifest.aligned else run.token_ids == ours


WRAPPER = """
import torch


class RosettaModel(torch.nn.Module):
    def __init__(self, model_list, base_model_idx, projector_list, multi_source_fusion_mode):
        super().__init__()
        assert (base_model_idx, multi_source_fusion_mode) == (0, "parallel")
        self.models, self.projectors, self.links = model_list, projector_list, []

    def set_projector_config(self, *link):
        self.links.append(link)

    def generate(self, kv_cache_index, input_ids, attention_mask, max_new_tokens, streamer, **options):
        assert len(self.links) == len(self.projectors)
        assert [part.shape[1] for part in kv_cache_index] == [6, 1]
        for number in range(1, len(self.models)):
            self.models[number].forward(input_ids=input_ids[number], attention_mask=attention_mask[number])
        result = self.models[0].forward(input_ids=input_ids[0], attention_mask=attention_mask[0], use_cache=True)
        streamer.put(input_ids[0])
        for step in range(max_new_tokens):
            if step:
                # As the research code does: a mask of the step's column alone.
                result = self.models[0].forward(
                    input_ids=token[:, None], attention_mask=torch.ones(1, 1), past_key_values=result.past_key_values
                )
            token = result.logits[:, -1].argmax(dim=-1)
            streamer.put(token)
        streamer.end()
"""
PROJECTOR = """
import torch


def load_projector(path):
    return torch.nn.Module()
"""


def test_the_process_times_what_a_checkout_computes_and_steps_see_all_rows(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "rosetta" / "model"
    model.mkdir(parents=True)
    (model / "wrapper.py").write_text(WRAPPER)
    (model / "projector.py").write_text(PROJECTOR)
    ids, folder = [5, 17, 200, 33, 60, 61, 7], GOLDEN / UNALIGNED
    request = ReferenceRequest(
        checkout=str(tmp_path),
        receiver=str(folder / "receiver"),
        sharers=[str(folder / "sharer")],
        fusers=[str(folder / "fuser")],
        fusion_mode="parallel",
        threads=1,
        new_tokens=4,
        repeats=2,
        prompts=[ReferencePrompt([ids, ids], [[1] * 7, [1] * 7], [(6, True), (1, False)])],
    )
    result = run_reference(request, None, SECONDS)
    (run,) = result.runs
    receiver = AutoModelForCausalLM.from_pretrained(folder / "receiver", dtype=torch.float32).eval()
    expected = list(ids)
    for _ in range(4):  # without a cache, so that there is no mask to be wrong
        expected.append(int(receiver(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert run.token_ids == expected[len(ids) :]
    assert len(run.steps) == 2 * 3
    assert min(run.steps) > 0
    for first, sharer, alone in zip(run.ttft, run.sharer_prefill, run.receiver_prefill, strict=True):
        assert sharer > 0
        assert alone > 0
        assert sharer + alone <= first
    assert result.peak_bytes > 0
    assert result.versions["torch"] == torch.__version__


@pytest.mark.xdist_group(UNALIGNED)
def test_models_that_are_not_found_in_time_are_an_error(
    recorded_pipeline: PipelineOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("c2c_export.bench.reference._FIND_SECONDS", 0.0)
    with pytest.raises(C2CError, match="--reference: its models were not there after 0 minutes"):
        find_sources(ReferenceOptions(tmp_path), recorded_pipeline(UNALIGNED).bundle.manifest)
