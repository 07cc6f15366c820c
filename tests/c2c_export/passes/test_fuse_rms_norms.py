"""Every RMS norm of every architecture is found, and the fused graph computes the same."""

import numpy as np
import onnx_ir as ir
import pytest
from tiny_models import CONFIGS, decoder_inputs, run_graph, traced_model

from c2c_export.passes.fuse_rms_norms import fuse_rms_norms

# Norms in each layer: before attention and MLP; of queries and keys (Qwen3, Gemma 3); after both (Gemma 3).
NORMS_PER_LAYER = {
    "llama_untied_biased": 2,
    "llama_llama3_rope": 2,
    "llama_yarn_relu": 2,
    "qwen2_sliding_from_layer_1": 2,
    "qwen3_wide_heads": 4,
    "mistral_sliding": 2,
    "gemma3": 6,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_norm_is_fused_and_the_numbers_stay(name: str) -> None:
    traced = traced_model(name)
    graph = ir.from_proto(traced.traced)
    expected_count = NORMS_PER_LAYER[name] * traced.model.config.num_hidden_layers + 1
    assert fuse_rms_norms(graph) == traced.counts["fuse_rms_norms"] == expected_count
    operators = [node.op_type for node in graph.graph]
    assert operators.count("RMSNormalization") == expected_count
    assert "Reciprocal" not in operators
    inputs = decoder_inputs(traced.traced)
    expected, found = run_graph(traced.traced, inputs), run_graph(ir.to_proto(graph), inputs)
    for output, values in expected.items():
        np.testing.assert_allclose(found[output], values, rtol=0, atol=1e-5)
    assert fuse_rms_norms(graph) == 0
