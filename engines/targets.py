"""What engines can be built for, and what each target is known to refuse: one table.

In: nothing. Out: `TARGETS`, which the pre-flight check of `c2c-export build`, `doctor` and the docs read. Limits were
found by building on a machine without a GPU, or are documented by NVIDIA where the text says so; `tensorrt` itself was
never tried, so its numbers are those of TensorRT for RTX, which has the same parser and API.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from c2c_export.errors import UsageError, install_command

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")

FAST_HEAD_SIZE_MULTIPLE = 8
"""Of ONNX Runtime's own attention on the CPU, "head_size must be a multiple of 8"."""


@dataclass(frozen=True)
class FusedAttention:
    """Where TensorRT has a single kernel for an attention. Elsewhere it takes several, which store the scores."""

    head_size_multiple: int = 8
    min_head_size: int = 16
    max_head_size: int = 256
    min_query_heads: int = 4
    """Of the decode profile, in which a request has one query row per head."""
    max_capacity: int = 24512
    """Likewise: rows of a cache whose scores a decode kernel holds."""

    def covers(self, *, num_query_heads: int, head_size: int, capacity: int) -> bool:
        """Whether an attention of this shape has a kernel of its own for prefill and for decode."""
        return (
            head_size % self.head_size_multiple == 0
            and self.min_head_size <= head_size <= self.max_head_size
            and num_query_heads >= self.min_query_heads
            and capacity <= self.max_capacity
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """A backend and what it takes. Compute capabilities are written "8.9"."""

    name: str
    module: str
    """The Python module that builds and runs it."""
    pip: str
    """How to install that module."""
    version_tried: str | None
    """The version that the limits were found with; None where it was never tried."""
    opset: int
    precisions: tuple[str, ...]
    needs_gpu_to_build: bool
    needs_gpu_to_run: bool
    compute_capabilities: tuple[str, ...] = ()
    """GPUs that it serves; empty for any."""
    default_compute_capabilities: tuple[str, ...] = ()
    """Which of them an engine serves when none are asked for."""
    precision_capability: dict[str, str] = field(default_factory=dict)
    """The lowest compute capability with kernels of a precision, where that is not the target's lowest."""
    max_head_size: int
    max_capacity: int
    prompt_memory: str = "the mask of a prompt that fills it takes capacity x capacity bytes"
    """What limits `max_capacity`."""
    fused_attention: FusedAttention | None = None
    max_tensor_elements: int | None = None
    """Of a cache of all requests; None where nothing but memory limits it."""
    known_limits: tuple[str, ...]

    @property
    def runs_on_onnx_runtime(self) -> bool:
        """Whether the lowered graphs are the engines, which ONNX Runtime reads."""
        return self.module == "onnxruntime"

    def refusal(
        self,
        precision: str,
        *,
        head_sizes: Iterable[int] = (),
        capacity: int = 1,
        compute_capabilities: Iterable[str] = (),
    ) -> str | None:
        """Why this target cannot have such an engine, as what was found and what is expected; None where it can."""
        if precision not in PRECISIONS:
            return f"precision {precision!r}: expected one of {', '.join(self.precisions)}"
        if precision not in self.precisions:
            reason = _PRECISION_REASONS.get((self.name, precision), "it has no kernels of this precision")
            return f"precision {precision}: {self.name} takes {' or '.join(self.precisions)}; {reason}"
        for size in head_sizes:
            if size % 2 or not 2 <= size <= self.max_head_size:
                return (
                    f"head size {size}: {self.name} takes even head sizes from 2 to {self.max_head_size}, "
                    "the largest that was tried"
                )
        if capacity > self.max_capacity:
            return (
                f"capacity {capacity}: {self.name} takes up to {self.max_capacity} rows, as {self.prompt_memory}; "
                "export with a smaller --max-length"
            )
        return self._capability_refusal(precision, tuple(compute_capabilities))

    @property
    def summary(self) -> str:
        """What it takes, in one line."""
        capabilities = (
            f", compute capability {', '.join(self.compute_capabilities)}" if self.compute_capabilities else ""
        )
        return (
            f"opset {self.opset}, {', '.join(self.precisions)}, even head sizes to {self.max_head_size}, capacity to "
            f"{self.max_capacity}{capabilities}"
        )

    def _capability_refusal(self, precision: str, wanted: tuple[str, ...]) -> str | None:
        for capability in wanted:
            number = capability_number(capability)
            if self.needs_gpu_to_build:
                return f"compute capability {capability}: {self.name} builds for the GPU of this machine only"
            if self.runs_on_onnx_runtime:
                return f"compute capability {capability}: {self.name} chooses its kernels when it runs; leave it out"
            if capability not in self.compute_capabilities:
                known = ", ".join(self.compute_capabilities) or "none"
                return f"compute capability {capability}: {self.name} {self.version_tried} builds for {known}"
            lowest = self.precision_capability.get(precision)
            if lowest is not None and number < capability_number(lowest):
                return (
                    f"compute capability {capability}: it has no {precision} kernels, they begin at {lowest}; "
                    "build for it in fp16"
                )
        return None


def capability_number(capability: str) -> int:
    """75 for "7.5", as in NVIDIA's names such as sm_75; sorts as GPUs do."""
    major, _, minor = capability.partition(".")
    if not (major.isdigit() and len(minor) == 1 and minor.isdigit()):
        raise UsageError(f"compute capability {capability!r}: expected two numbers with a dot, such as 8.9")
    return int(major) * 10 + int(minor)


class SlowAttentionWarning(UserWarning):
    """A model whose decoder `ort-cpu` runs at the cost of the whole capacity."""


def warn_of_slow_attention(target: str, models: Iterable[tuple[str, int]]) -> None:
    """Issue a `SlowAttentionWarning` for each of `models`, sources and head sizes, that `target` is slow with."""
    for source, head_size in models:
        if target == "ort-cpu" and head_size % FAST_HEAD_SIZE_MULTIPLE:
            warnings.warn(
                f"{source}: its head size of {head_size} is no multiple of {FAST_HEAD_SIZE_MULTIPLE}, so every token "
                f"costs on {target} what a full cache costs; a smaller --max-length makes it faster",
                SlowAttentionWarning,
                stacklevel=2,
            )


def target_of(name: str) -> Target:
    """The target of this name. Raises `UsageError` naming those there are."""
    if name not in TARGETS:
        raise UsageError(f"engine {name!r}: expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


_PRECISION_REASONS = {
    **{(name, "fp32"): "its attention has no fp32 kernel" for name in ("tensorrt", "tensorrt-rtx")},
    **{("ort-cpu", name): "a CPU computes in fp32; int8 and int4 make it faster" for name in ("fp16", "bf16")},
}

_TENSORRT_LIMITS = (
    "Attention: no softcap, no past/present inputs, one output, no softmax_precision attribute: the ONNX parser "
    "refuses them",
    "Attention: nonpad_kv_seqlen is accepted and ignored; a mask is passed, and every input checked to be used",
    "Attention: one kernel of its own for head sizes 16 to 256 that are multiples of 8, in decode for 4 query heads or "
    "more and up to 24512 rows; else TensorRT takes several kernels (the manifest says where)",
    "Attention: head sizes from 10 to 250 that are no multiple of 8 fail in TensorRT's own compiler in some graphs "
    "(seen without biases on the projections; head size 12 of a Qwen2 model builds)",
    "Caches: the capacity is static, cache tensors are inputs and outputs of the network and share their memory",
    "INT4 weights: block-wise scales along the rows of a matrix product",
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="ort-cpu",
            module="onnxruntime",
            pip=install_command(),
            version_tried="1.32.0",
            opset=24,
            precisions=("fp32", "int8", "int4"),
            needs_gpu_to_build=False,
            needs_gpu_to_run=False,
            max_head_size=1024,
            max_capacity=131072,
            prompt_memory="the mask of a prompt that fills it takes 4 x capacity x capacity bytes (69 GB there), and "
            "12 in models with sliding windows",
            known_limits=(
                "a prompt of n tokens takes 4 x n x n bytes for each of a model's masks, one or two, and 8 x n x n "
                "more where layers have a sliding window",
                "attention costs what the capacity costs, not what the length costs, for head sizes that are no "
                "multiple of 8",
                "one call takes one prompt, or one token each of several requests (else GroupQueryAttention refuses)",
                "in int8 and int4, matrices whose shape no kernel takes stay in fp32",
            ),
        ),
        Target(
            name="ort-cuda",
            module="onnxruntime",
            pip="bash scripts/install_gpu.sh",
            version_tried=None,
            opset=24,
            precisions=("fp32", "fp16"),
            needs_gpu_to_build=False,
            needs_gpu_to_run=True,
            max_head_size=1024,
            max_capacity=131072,
            known_limits=(
                "never executed by this project; operators without a CUDA kernel are run on the CPU, with copies",
                "onnxruntime and onnxruntime-gpu are one module: installing both breaks it",
            ),
        ),
        Target(
            name="tensorrt",
            module="tensorrt",
            pip=install_command("tensorrt"),
            version_tried=None,
            opset=24,
            precisions=("fp16", "bf16", "int8", "int4"),
            needs_gpu_to_build=True,
            needs_gpu_to_run=True,
            compute_capabilities=("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"),
            precision_capability={"bf16": "8.0"},
            max_head_size=1024,
            max_capacity=131072,
            fused_attention=FusedAttention(),
            max_tensor_elements=2**31 - 1,
            known_limits=(
                "never tried by this project: it needs a GPU, and NVIDIA's package index",
                "an engine runs on the GPU model and with the version that built it",
                "at least 10.15, the first version with native cache updates and rotary embeddings",
                *_TENSORRT_LIMITS,
            ),
        ),
        Target(
            name="tensorrt-rtx",
            module="tensorrt_rtx",
            pip=install_command("tensorrt-rtx"),
            version_tried="1.7.1.116",
            opset=24,
            precisions=("fp16", "bf16", "int8", "int4"),
            needs_gpu_to_build=False,
            needs_gpu_to_run=True,
            compute_capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
            default_compute_capabilities=("8.0", "8.6", "8.9", "12.0", "12.1"),
            precision_capability={"bf16": "8.0", "int8": "8.0", "int4": "8.0"},
            max_head_size=1024,
            max_capacity=131072,
            fused_attention=FusedAttention(),
            max_tensor_elements=2**31 - 1,
            known_limits=(
                "an engine serves every RTX GPU from compute capability 8.0 on, or those it was asked for; 7.5 only "
                "when asked for, and without bf16, int8 and int4 (NVIDIA's support matrix)",
                "kernels are compiled when an engine is first run on a GPU, and kept in a runtime cache; there is no "
                "timing cache",
                *_TENSORRT_LIMITS,
            ),
        ),
    )
}


def default_precision(name: str) -> str:
    """The precision that a target's engines are built in unless another is asked for."""
    return "fp32" if name == "ort-cpu" else "fp16"
