"""Convert a `.gguf` file to a Hugging Face folder, once: the folder is kept in a cache and found by the file's sha256.

The conversion is transformers' own (`from_pretrained(gguf_file=…)`), weights dequantised to float32. It takes minutes,
most of them for reading the token lists element by element, so the file is parsed only once and the result is kept.
The cache is that of `c2c_export.cache`.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from c2c_export.bundle import sha256_of
from c2c_export.cache import cache_folder
from c2c_export.errors import C2CError, reason_of
from c2c_export.staging import partial_folder


def convert_gguf(path: Path) -> Path:
    """The converted folder for the `.gguf` file at `path`. Raises `C2CError` naming the file when it cannot be read."""
    folder = cache_folder() / "gguf" / sha256_of(path)
    if folder.is_dir():
        return folder
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(partial_folder(folder.parent, folder.name))
        except OSError as error:
            raise C2CError(
                f"{folder.parent}: cannot be written ({error.strerror}); set C2C_EXPORT_CACHE to a folder for "
                "conversions"
            ) from error
        try:
            _convert(path, partial)
            partial.chmod(0o755)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process converted the same file in the meantime
                    raise
        except (OSError, SafetensorError) as error:
            raise C2CError(f"{path}: cannot be converted into {folder.parent}: {error}") from error
    return folder


def _convert(path: Path, folder: Path) -> None:
    with _parse_once():
        try:
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except Exception as error:  # a damaged file surfaces as whatever its bytes happened to mean
            raise C2CError(f"{path}: transformers cannot read this .gguf file: {reason_of(error)}") from error
    # The weights are plain float32 now; transformers refuses to save a model that it still calls quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _parse_once() -> Iterator[None]:
    """Let configuration, weights and tokenizer, which transformers loads separately, share one parsed file."""
    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader
