"""Counted work against counts made another way: from transformers' modules, from the fuser's tensors, pair by pair."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from c2c_export.bench.report import PhaseTimes, PromptRecord
from c2c_export.bench.roofline import gemm_shapes, read_pair_work, speed_shares
from c2c_export.bench.work import GraphWork, lookup_weight_bytes, product_weight_bytes, read_graph_work
from c2c_export.bundle import Bundle
from runtime.cache import cache_row_bytes

GOLDEN = Path(__file__).parents[2] / "golden"
UNALIGNED, ALIGNED = "qwen3_from_qwen2", "llama_from_gemma3_aligned"

each_pair = pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (UNALIGNED, ALIGNED)]
)


@pytest.fixture
def bundle(pair: str, recorded_bundle: Callable[[str], Path]) -> Bundle:
    return Bundle.open(recorded_bundle(pair))


def projector_states(pair: str) -> list[dict[str, torch.Tensor]]:
    folder = GOLDEN / pair / "fuser" / "final"
    layers = json.loads((folder / "projector_config.json").read_text())["0"]["1"]
    return [torch.load(folder / f"projector_{pairs[0][1]}.pt", weights_only=True) for pairs in layers.values()]


@each_pair
def test_a_receivers_products_are_those_of_its_linear_layers(pair: str, bundle: Bundle):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / pair / "receiver", dtype=torch.float32)
    last = model.model.layers[-1]
    after_attention = [last.self_attn.o_proj, *last.mlp.children()]
    of_chosen_token = [module for module in after_attention if isinstance(module, torch.nn.Linear)]
    of_all = [
        module
        for module in model.model.modules()
        if isinstance(module, torch.nn.Linear) and not any(module is one for one in of_chosen_token)
    ]
    work = read_graph_work(bundle.file(bundle.manifest.receiver_graph.path))
    assert sorted(work.weight_shapes) == sorted((module.in_features, module.out_features) for module in of_all)
    expected = [(module.in_features, module.out_features) for module in (*of_chosen_token, model.lm_head)]
    assert sorted(work.chosen_token_shapes) == sorted(expected)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert work.attention_width == config.num_hidden_layers * config.num_attention_heads * head_dim


@each_pair
def test_a_fusers_products_are_those_of_its_open_gates(pair: str, bundle: Bundle):
    (sharer,) = bundle.manifest.sharers
    assert sharer.fuser_graph is not None
    work = read_graph_work(bundle.file(sharer.fuser_graph.path))
    expected = [
        (tensor.shape[1], tensor.shape[0])
        for state in projector_states(pair)
        for side in ("key", "value")
        if state[f"{side}_gate_logit"] > 0
        for name, tensor in state.items()
        if name.startswith(f"{side}_") and tensor.ndim == 2
    ]
    assert sorted(work.weight_shapes) == sorted(expected)
    assert (work.chosen_token_shapes, work.attention_width) == ((), 0)


@pytest.mark.parametrize(("num_tokens", "first_row", "num_logits"), [(7, 0, 1), (5, 3, 0), (1, 9, 1)])
def test_operations_are_those_of_every_product_and_every_pair(num_tokens: int, first_row: int, num_logits: int):
    work = GraphWork(weight_shapes=((4, 6), (6, 2)), chosen_token_shapes=((4, 50),), attention_width=24)
    expected = 0
    for token in range(num_tokens):
        expected += 2 * 4 * 6 + 2 * 6 * 2
        for _row in range(first_row + token + 1):
            expected += 2 * 24 + 2 * 24
    assert work.flops(num_tokens, first_row=first_row, num_logits=num_logits) == expected + num_logits * 2 * 4 * 50


@each_pair
def test_a_step_reads_every_weight_but_a_table_that_is_only_looked_up(pair: str, bundle: Bundle):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / pair / "receiver", dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    looked_up = 0 if model.config.tie_word_embeddings else embedding.numel()
    expected = 4 * (sum(parameter.numel() for parameter in model.parameters()) - looked_up)
    found = product_weight_bytes(bundle.file(bundle.manifest.receiver_graph.path))
    # The graph has a few constants more: the numbers of the rows, the rotary frequencies.
    assert expected <= found <= expected + 8 * bundle.manifest.max_length + 1024
    assert lookup_weight_bytes(bundle.file(bundle.manifest.receiver_graph.path)) == 4 * looked_up
    # A sharer has no LM head.
    (sharer,) = bundle.manifest.sharers
    assert sharer.sharer_graph is not None
    embedding = AutoModelForCausalLM.from_pretrained(GOLDEN / pair / "sharer").get_input_embeddings().weight
    assert lookup_weight_bytes(bundle.file(sharer.sharer_graph.path)) == 4 * embedding.numel()
    record = bundle.manifest.receiver
    assert cache_row_bytes(bundle.manifest.receiver_graph.inputs) == 4 * 2 * (
        record.num_layers * record.num_key_value_heads * record.head_dim
    )


@each_pair
def test_shares_are_work_over_time_and_speed(bundle: Bundle):
    work = read_pair_work(bundle, bundle.manifest.engines["ort-cpu-fp32"])
    times = PhaseTimes(
        ttft=0.9,
        ttft_range=(0.8, 1.1),
        sharer_prefill=0.2,
        receiver_prefill=0.3,
        fuse=0.1,
        rest=0.3,
        decode_ms_per_token=4.0,
        decode_ms_quartiles=(3.0, 5.0),
        tokens_per_second=250.0,
    )
    prompt = PromptRecord(
        asked_tokens=40,
        receiver_tokens=40,
        sharer_tokens={0: 39},
        fused_tokens=39,
        c2c=times,
        receiver_alone=times,
        memory=None,
    )
    shares = speed_shares(work, prompt, new_tokens=10, gflops=2.0, read_speed=0.5)
    receiver, fuser, sharer = (
        1e-9 * work.receiver.flops(40, num_logits=1),
        1e-9 * work.fusers[0].flops(39),
        1e-9 * work.sharers[0].flops(39),
    )
    assert shares.receiver_prefill == pytest.approx(receiver / (0.3 * 2.0))
    assert shares.fuse == pytest.approx(fuser / (0.1 * 2.0))
    assert shares.sharer_prefill == pytest.approx(sharer / (0.2 * 2.0))
    assert shares.ttft == pytest.approx((receiver + fuser + sharer) / (0.9 * 2.0))
    assert shares.decode_bytes == work.step_weight_bytes + 44 * work.row_bytes
    assert shares.decode == pytest.approx(shares.decode_bytes / (4e-3 * 0.5e9))
    shapes = gemm_shapes(work, 40)
    assert {(k, n) for _, k, n in shapes[:-1]} <= {
        *work.receiver.weight_shapes,
        *work.sharers[0].weight_shapes,
        *work.fusers[0].weight_shapes,
    }
