"""Tiny, randomly initialised language models of every supported architecture, traced once per process.

In: a name out of `CONFIGS`. Out: the transformers model and its portable graph, before and after the passes. The norm
weights are random too, so that a norm which is dropped or applied twice shows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from c2c_export.passes import RECEIVER_PASSES
from c2c_export.trace.decoder import trace_decoder

CAPACITY = 24
VOCAB = 61
WINDOW = 5
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama_untied_biased": lambda: LlamaConfig(
        **_SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True, head_dim=8
    ),
    "llama_llama3_rope": lambda: LlamaConfig(
        **_SIZES,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_yarn_relu": lambda: LlamaConfig(
        **_SIZES,
        tie_word_embeddings=True,
        hidden_act="relu",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2_sliding_from_layer_1": lambda: Qwen2Config(
        **_SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3_wide_heads": lambda: Qwen3Config(**_SIZES, tie_word_embeddings=True, head_dim=12),
    "mistral_sliding": lambda: MistralConfig(**_SIZES, sliding_window=WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SIZES, "num_key_value_heads": 1},
        head_dim=16,
        sliding_window=WINDOW,
        sliding_window_pattern=2,
        query_pre_attn_scalar=20,
        final_logit_softcapping=3.0,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        },
    ),
}
SLIDING = ("qwen2_sliding_from_layer_1", "mistral_sliding", "gemma3")

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model, its graph as it was traced, the same after `RECEIVER_PASSES`, and what the passes counted."""

    model: PreTrainedModel
    traced: onnx.ModelProto
    passed: onnx.ModelProto
    counts: dict[str, int]


def build_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model with eager attention; every parameter random, norm weights about their neutral value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Gemma adds one to its norm weights itself
                neutral = 0.0 if config.model_type == "gemma3_text" else 1.0
                parameter.copy_(neutral + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


@functools.cache
def traced_model(name: str) -> TracedModel:
    """The model `name` out of `CONFIGS`, traced for caches of `CAPACITY` rows."""
    model = build_model(CONFIGS[name]())
    graph = trace_decoder(model, CAPACITY)
    traced = ir.to_proto(graph)
    counts = {pass_name: apply(graph) for pass_name, apply in RECEIVER_PASSES}
    return TracedModel(model, traced, ir.to_proto(graph), counts)


def run_graph(proto: onnx.ModelProto, inputs: dict[str, NDArray[np.generic]]) -> dict[str, Floats]:
    """Run a small graph on ONNX Runtime's CPU provider, giving it those of `inputs` that it has."""
    outputs = graph_session(proto).run(None, {spec.name: inputs[spec.name] for spec in proto.graph.input})
    return dict(zip((output.name for output in proto.graph.output), outputs, strict=True))


def graph_session(proto: onnx.ModelProto) -> ort.InferenceSession:
    """An ONNX Runtime CPU session over a small graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def decoder_inputs(proto: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Inputs for a decoder graph of a model in `CONFIGS`: two prompts of seven tokens, and caches of noise."""
    random = np.random.default_rng(0)
    inputs: dict[str, NDArray[np.generic]] = {
        "input_ids": random.integers(0, VOCAB, (2, 7)),
        "position_ids": np.tile(np.arange(7) + 2, (2, 1)),
        "write_index": np.zeros(2, dtype=np.int64),
        "kv_length": np.full(2, 7),
        "last_token": np.full(2, 6),
        "row_position_ids": np.tile(np.arange(CAPACITY) + 2, (2, 1)),
    }
    for spec in proto.graph.input:
        if spec.name.startswith("past_"):
            shape = [dim.dim_value for dim in spec.type.tensor_type.shape.dim[1:]]
            inputs[spec.name] = random.normal(size=(2, *shape)).astype(np.float32)
    return {spec.name: inputs[spec.name] for spec in proto.graph.input}
