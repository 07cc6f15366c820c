"""Graph passes: functions that change a graph and return how often they applied, one per file.

`RECEIVER_PASSES`, `sharer_passes` and `FUSER_PASSES` are the order in which they run. The counts go into the manifest.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from c2c_export.passes.fold_constants import fold_constants
from c2c_export.passes.fold_gates import fold_gates
from c2c_export.passes.fuse_rms_norms import fuse_rms_norms
from c2c_export.passes.fuse_rotary import fuse_rotary
from c2c_export.passes.prune_sharer import CacheName, prune_sharer
from c2c_export.passes.remove_unused import remove_unused
from c2c_export.passes.select_last_token import select_last_token
from c2c_export.passes.share_equal_nodes import share_equal_nodes

Pass = Callable[[ir.Model], int]

RECEIVER_PASSES: Sequence[tuple[str, Pass]] = (
    ("fuse_rms_norms", fuse_rms_norms),
    ("fuse_rotary", fuse_rotary),
    ("select_last_token", select_last_token),
    ("share_equal_nodes", share_equal_nodes),
    ("remove_unused", remove_unused),
)

FUSER_PASSES: Sequence[tuple[str, Pass]] = (
    ("fold_gates", fold_gates),
    ("fold_constants", fold_constants),
    ("fuse_rms_norms", fuse_rms_norms),
    ("share_equal_nodes", share_equal_nodes),
    ("remove_unused", remove_unused),
)


def sharer_passes(read: frozenset[CacheName]) -> Sequence[tuple[str, Pass]]:
    """The passes for a sharer of which the fuser reads the caches in `read`."""
    return (("prune_sharer", lambda model: prune_sharer(model, read)), *RECEIVER_PASSES)


def apply_passes(model: ir.Model, passes: Sequence[tuple[str, Pass]]) -> dict[str, int]:
    """Run `passes` in order; return how often each applied, by name."""
    return {name: run(model) for name, run in passes}
