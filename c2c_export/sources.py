"""Where models and fusers come from: a folder, a hub id, or a `.gguf` file, each turned into a local folder.

folder                         used as it is
id, id@revision                downloaded by huggingface_hub, or found in its cache (HF_HUB_OFFLINE is honoured)
id:subfolder[@revision]        for fusers, for example nics-efc/C2C_Fuser:qwen3_0.6b+qwen2.5_0.5b_Fuser
file.gguf                      converted once by transformers' own loader, see `c2c_export.gguf`
"""

import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from c2c_export.errors import C2CError, UsageError, reason_of
from c2c_export.gguf import convert_gguf

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?P<subfolder>:[^@]+)?(?P<revision>@[\w./-]+)?", flags=re.ASCII)
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# What a model may also come as, though it is not downloaded so.
_OTHER_WEIGHTS = ["*.bin", "*.gguf"]
# Without a subfolder: only a checkpoint at the root, as a repository may hold dozens of them.
_FUSER_FILES = ["config.json", "final/*", "projector_*", "sharer_chat_template.jinja", "receiver_chat_template.jinja"]


def resolve_model(source: str) -> Path:
    """The local folder, in Hugging Face's layout, of the model that `source` names.

    Raises `UsageError` when it is neither a path nor a hub id, `C2CError` when it cannot be downloaded or converted.
    """
    path = Path(source)
    if source and path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{source}: no such .gguf file")
        return convert_gguf(path)
    if path.exists():
        raise UsageError(f"{source}: expected a model folder or a .gguf file")
    return _download(source, "model", _MODEL_FILES)


def is_model_file(name: str) -> bool:
    """Whether a file of that name, in a model's folder, is part of the model; a README or a licence is not."""
    return any(fnmatch(name, pattern) for pattern in (*_MODEL_FILES, *_OTHER_WEIGHTS))


def resolve_fuser(source: str) -> Path:
    """The local folder of the fuser checkpoint that `source` names; errors as in `resolve_model`."""
    path = Path(source)
    if source and path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{source}: expected a fuser checkpoint folder")
    return _download(source, "fuser", _FUSER_FILES)


def _download(source: str, what: str, patterns: list[str]) -> Path:
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "/", "~")) or (match["subfolder"] and what == "model"):
        raise UsageError(f"{source}: no such {what}; expected a folder{_OTHER_FORMS[what]}")
    subfolder = (match["subfolder"] or "")[1:].strip("/")
    if ".." in Path(subfolder).parts:
        raise UsageError(f"{source}: the subfolder leaves the repository; expected a folder inside it")
    try:
        snapshot = snapshot_download(
            match["repository"],
            revision=(match["revision"] or "")[1:] or None,
            allow_patterns=[f"{subfolder}/*"] if subfolder else patterns,
        )
    except Exception as error:  # the hub client raises many kinds: network, authentication, offline, bad revision
        raise C2CError(
            f"{source}: no such folder here, and the hub did not give it: {reason_of(error)}\n"
            "Check the spelling, the revision and the network, or download it and pass the folder."
        ) from error
    folder = Path(snapshot) / subfolder
    if not folder.is_dir():
        raise C2CError(f"{source}: the repository has no folder {subfolder!r}")
    return folder


_OTHER_FORMS = {
    "model": ", a .gguf file, or a hub id such as Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@revision",
    "fuser": " or a hub id such as nics-efc/C2C_Fuser:qwen3_0.6b+qwen2.5_0.5b_Fuser",
}
