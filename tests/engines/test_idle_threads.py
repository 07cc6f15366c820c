"""An engine's threads take no processor time once a run is over: another engine computes on the same cores then."""

import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.ort.engine import OrtCpuEngine

_SIZE = 1024
_PAUSE = 0.1


def product(path: Path) -> Path:
    """A graph of one product that is large enough to be computed by several threads."""
    weight = ir.Value(name="b", const_value=ir.tensor(np.full((_SIZE, _SIZE), 0.5, dtype=np.float32), name="b"))
    shape, dtype = ir.Shape([_SIZE, _SIZE]), ir.TensorType(ir.DataType.FLOAT)
    rows, result = ir.Value(name="a", shape=shape, type=dtype), ir.Value(name="c", shape=shape, type=dtype)
    node = ir.Node("", "MatMul", [rows, weight], outputs=[result])
    graph = ir.Graph([rows], [result], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="product")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def test_threads_do_not_spin_after_a_run(tmp_path: Path):
    engine = OrtCpuEngine(product(tmp_path / "product.onnx"), 4)
    buffers = {
        spec.name: engine.device.allocate((_SIZE, _SIZE), "float32") for spec in (*engine.inputs, *engine.outputs)
    }
    binding = engine.bind({name: buffer.view() for name, buffer in buffers.items()})
    time.sleep(_PAUSE)  # threads of engines that other tests ran
    spent = []
    for _ in range(5):
        engine.run(binding)
        before = time.process_time()
        time.sleep(_PAUSE)
        spent.append(time.process_time() - before)
    # Three threads that spin would take three times the pause, or as much of it as they spin.
    assert min(spent) < 0.05 * _PAUSE
