"""The constants of an `RMSNormalization`, beside its weight, against the trained norm's."""

import numpy as np
import onnx_ir as ir


def epsilon_problem(node: ir.Node, expected: float) -> str | None:
    """What is wrong with the constants of an `RMSNormalization`, which divides by sqrt(mean square + epsilon)."""
    found = node.attributes.get_float("epsilon", 1e-5)
    if np.float32(found) != np.float32(expected):
        ratio = found / expected if expected else 0.0
        times = f", {ratio:.3g} times as large" if ratio else ""
        return f"the norm's epsilon is {found:.6g}, expected {expected:.6g}{times}"
    if node.attributes.get_int("stash_type", 1) != 1:
        return "the norm's statistics are not in float32"
    return None
