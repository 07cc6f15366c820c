"""The runtime of Cache-to-Cache bundles: `C2CPipeline` loads a bundle, `Session` holds one conversation's caches,
`AsyncC2CEngine` serves many requests at once.

Neither torch nor transformers is needed or imported.
"""

from c2c_export.errors import BundleError, C2CError, UsageError
from runtime.async_engine import AsyncC2CEngine
from runtime.checked import FailedEngineError, UncheckedEngineWarning
from runtime.generation import Chunk, Generation, Timings, TokenLogprob
from runtime.messages import Message
from runtime.pipeline import C2CPipeline
from runtime.request import AbortedError, ClosedError, DeadlineError, QueueFullError, Request
from runtime.sampling import SamplingParams
from runtime.scheduler_observer import SchedulerObserver
from runtime.scheduler_options import SchedulerOptions
from runtime.score import Score
from runtime.sections import UnfusedMessageWarning
from runtime.session import Session

__all__ = [
    "AbortedError",
    "AsyncC2CEngine",
    "BundleError",
    "C2CError",
    "C2CPipeline",
    "Chunk",
    "ClosedError",
    "DeadlineError",
    "FailedEngineError",
    "Generation",
    "Message",
    "QueueFullError",
    "Request",
    "SamplingParams",
    "SchedulerObserver",
    "SchedulerOptions",
    "Score",
    "Session",
    "Timings",
    "TokenLogprob",
    "UncheckedEngineWarning",
    "UnfusedMessageWarning",
    "UsageError",
]
