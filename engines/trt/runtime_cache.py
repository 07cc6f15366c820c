"""Keep the kernels that TensorRT for RTX compiles when an engine first runs on a GPU, for the processes after this one.

In: an engine file and the configurations of its execution contexts. Out: a file in the cache folder, read when the
engine is loaded and written when it is let go or the process ends. TensorRT itself refuses a file of another version,
GPU or driver, and then compiles anew
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html). Never
executed: it takes a GPU (docs/gpu.md). Not covered: `tensorrt`, which compiles when it builds, and has a timing cache.
"""

import warnings
import weakref
from pathlib import Path
from typing import Any

from c2c_export.bundle import sha256_of
from c2c_export.cache import cache_folder


class RuntimeCache:
    """The compiled kernels of one engine, shared by all of its contexts."""

    def __init__(self, engine_path: Path) -> None:
        self._path = cache_folder() / "kernels" / f"{sha256_of(engine_path)}.cache"
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Let the context that is made from the `IRuntimeConfig` `config` take kernels from here, and put them here."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            known = self._path.read_bytes() if self._path.is_file() else b""
            if known:
                self._cache.deserialize(known)
            weakref.finalize(self, _save, self._cache, self._path, known)
        config.set_runtime_cache(self._cache)


def _save(cache: Any, path: Path, known: bytes) -> None:
    content = bytes(cache.serialize())
    if content == known:
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.rename(path)
    except OSError as error:
        warnings.warn(f"{path}: compiled kernels cannot be kept for the next start: {error}", stacklevel=2)
