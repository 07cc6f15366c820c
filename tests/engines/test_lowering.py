"""What an export should have fused or folded is refused when a fuser is lowered, and so is a precision that is none."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from c2c_export.errors import C2CError
from engines.lowering import lower


def graph_of(node: onnx.NodeProto, path: Path) -> Path:
    """A graph of one operator, from x [4] and the constant `gate_logit`, as a fuser's file."""
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'projectors.2', 'operation']")
    dtype = TensorProto.BOOL if node.op_type == "Greater" else TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "fuser",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(np.array([1.0], dtype=np.float32), "gate_logit")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), path)
    return path


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("ReduceMean", ["x"], ["y"]), "its norm is no RMSNormalization"),
        (helper.make_node("Greater", ["x", "gate_logit"], ["y"]), "its gate is computed, and was not folded"),
    ],
    ids=["norm", "gate"],
)
def test_a_fuser_with_a_norm_or_a_gate_left_over_is_refused(
    node: onnx.NodeProto, message: str, precision: str, tmp_path: Path
):
    path = graph_of(node, tmp_path / "fuser0.onnx")
    with pytest.raises(C2CError, match=rf"layer projectors\.2: {message}; export the bundle again"):
        lower(path, "ort-cpu", precision, is_fuser=True)


@pytest.mark.parametrize(
    ("target", "precision"), [("ort-cpu", "fp16"), ("ort-cpu", "int2"), ("tensorrt", "fp32"), ("tensorrt", "int2")]
)
def test_a_precision_that_a_target_does_not_have_is_refused(target: str, precision: str, tmp_path: Path):
    path = graph_of(helper.make_node("Abs", ["x"], ["y"]), tmp_path / "fuser0.onnx")
    with pytest.raises(C2CError, match=f"precision '{precision}': expected one of"):
        lower(path, target, precision, is_fuser=True)
