"""Keep the kernels that TensorRT for RTX compiles when an engine first runs on a GPU, for the processes after this one.

In: an engine file and the configurations of its execution contexts. Out: a file in the cache folder, read when the
engine is loaded and written when it is let go or the process ends. TensorRT itself refuses a file of another version,
GPU or driver, and then compiles anew; so it does where the file cannot be read. No trouble with the file is an error
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html). Never
executed: it takes a GPU (docs/gpu.md). Not covered: `tensorrt`, which compiles when it builds, and has a timing cache.
"""

import warnings
import weakref
from pathlib import Path
from typing import Any

from c2c_export.atomic_file import write_atomically
from c2c_export.bundle import sha256_of
from c2c_export.cache import cache_folder


class RuntimeCache:
    """The compiled kernels of one engine, shared by all of its contexts."""

    def __init__(self, engine_path: Path) -> None:
        self._path = cache_folder() / "kernels" / f"{sha256_of(engine_path)}.cache"
        self._cache: Any = None
        self._is_refused = False

    def attach(self, config: Any) -> None:
        """Let the context that is made from the `IRuntimeConfig` `config` take kernels from here, and put them here."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            known = _read(self._path)
            if known:
                self._cache.deserialize(known)
            weakref.finalize(self, _save, self._cache, self._path, known)
        if not config.set_runtime_cache(self._cache) and not self._is_refused:
            self._is_refused = True
            warnings.warn(
                f"{self._path}: TensorRT does not take this runtime cache; kernels are compiled anew at every start",
                stacklevel=2,
            )


def _read(path: Path) -> bytes:
    """The file's content; nothing where there is none or it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        warnings.warn(f"{path}: compiled kernels cannot be read, and are compiled anew: {error}", stacklevel=2)
        return b""


def _save(cache: Any, path: Path, known: bytes) -> None:
    content = bytes(cache.serialize())
    if content == known:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        warnings.warn(f"{path}: compiled kernels cannot be kept for the next start: {error}", stacklevel=2)
