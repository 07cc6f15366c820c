"""The runtime of Cache-to-Cache bundles: `C2CPipeline` loads a bundle, `Session` holds one conversation's caches.

Neither torch nor transformers is needed or imported.
"""

from c2c_export.errors import BundleError, C2CError, UsageError
from runtime.checked import FailedEngineError, UncheckedEngineWarning
from runtime.generation import Chunk, Generation, Timings
from runtime.messages import Message
from runtime.pipeline import C2CPipeline
from runtime.sampling import SamplingParams
from runtime.score import Score
from runtime.sections import UnfusedMessageWarning
from runtime.session import Session

__all__ = [
    "BundleError",
    "C2CError",
    "C2CPipeline",
    "Chunk",
    "FailedEngineError",
    "Generation",
    "Message",
    "SamplingParams",
    "Score",
    "Session",
    "Timings",
    "UncheckedEngineWarning",
    "UnfusedMessageWarning",
    "UsageError",
]
