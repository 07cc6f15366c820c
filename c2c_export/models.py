"""Read a language model for export: configuration and weight files checked first, then the weights in float32.

In: a local folder in Hugging Face's layout. Out: its configuration, its `ModelShape`, the loaded model. Supported are
the architectures in `SUPPORTED_ARCHITECTURES`; others are refused by name, as is what the graphs cannot express.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from c2c_export.bundle import ModelRecord, sha256_of
from c2c_export.errors import C2CError, reason_of
from c2c_export.sources import is_model_file
from c2c_export.trace.decoder import sliding_window_of

SUPPORTED_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelShape:
    """What the fuser and the caches need to know of a model, read from its configuration alone."""

    architecture: str
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int | None
    max_position_embeddings: int


def read_config(folder: Path) -> Any:
    """The model's transformers configuration. Raises `C2CError` when it is missing, broken or not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise C2CError(f"{folder}: no config.json; expected a Hugging Face model folder")
    # before transformers reads it, which knows some architectures only by running the repository's own code
    _check_architecture(path, _read_json(path))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a broken field leads to
        raise C2CError(f"{path}: transformers cannot read it: {reason_of(error)}") from error
    _check_supported(path, config)
    return config


def shape_of(config: Any) -> ModelShape:
    """The shape that a checked configuration describes."""
    return ModelShape(
        architecture=SUPPORTED_ARCHITECTURES[config.model_type],
        num_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        sliding_window=sliding_window_of(config),
        max_position_embeddings=config.max_position_embeddings,
    )


def check_weight_files(folder: Path) -> None:
    """Look through the safetensors files before the long work: each complete, each value finite; tensor by tensor.

    Raises `C2CError` naming the file, and the tensor. Whether they hold all that the model needs, and what a `.bin`
    file holds, shows when the model is loaded.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
    if not files and not any(folder.glob("*.bin")):
        raise C2CError(f"{folder}: no weights; expected .safetensors files")
    for file in files:
        if not file.is_file():
            raise C2CError(f"{file}: missing, although {index.name} names it")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                        raise C2CError(f"{file}: tensor {name} holds NaN or infinite values")
        except (SafetensorError, OSError) as error:
            raise C2CError(f"{file}: the weights cannot be read: {reason_of(error)}") from error


def load_weights(folder: Path, config: Any) -> PreTrainedModel:
    """The model in float32, ready to trace.

    Raises `C2CError` when a weight file is missing or truncated, a tensor is missing or of another shape, or holds a
    value that is not finite; the message names it.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # else the error does not say which tensor
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, torch and transformers each have their own kinds
        raise C2CError(f"{folder}: the weights cannot be loaded: {reason_of(error)}") from error
    # transformers fills missing tensors with random numbers and only logs it
    missing = sorted(loading["missing_keys"])
    if missing:
        raise C2CError(f"{folder}: the weights lack {len(missing)} tensor(s), first {missing[0]}")
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        raise C2CError(f"{folder}: tensor {mismatched[0][0]} has another shape than config.json says")
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise C2CError(f"{folder}: tensor {name} holds NaN or infinite values")
    return model.eval()


def read_stop_ids(folder: Path, config: Any, tokenizer_end_id: int | None) -> tuple[int, ...]:
    """The ids that end a generation: the generation config's, else the model config's, else the tokenizer's end id.

    Raises `C2CError` when there is a generation config that cannot be read.
    """
    path = folder / "generation_config.json"
    generation = GenerationConfig.from_model_config(config)
    if path.is_file():
        try:
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises whatever a broken field leads to
            raise C2CError(f"{path}: transformers cannot read it: {reason_of(error)}") from error
    for ids in (generation.eos_token_id, config.eos_token_id, tokenizer_end_id):
        if ids is not None:
            several = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in several):
                where = path if ids is generation.eos_token_id and path.is_file() else folder / "config.json"
                raise C2CError(f"{where}: field eos_token_id is {ids!r}, expected a token id or a list of token ids")
            return several
    return ()


def model_record(source: str, folder: Path, shape: ModelShape, chat_template: str) -> ModelRecord:
    """The manifest's record of a model; a single file is hashed itself, a folder by the model's files."""
    given = Path(source)
    in_folder = sorted(path for path in folder.iterdir() if path.is_file() and is_model_file(path.name))
    files = [given] if given.is_file() else in_folder
    return ModelRecord(
        source=source,
        architecture=shape.architecture,
        num_layers=shape.num_layers,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        sliding_window=shape.sliding_window,
        max_position_embeddings=shape.max_position_embeddings,
        chat_template=chat_template,
        sources={path.name: sha256_of(path) for path in files},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise C2CError(f"{path}: not valid JSON ({error}); download or copy the model again") from error
    if not isinstance(content, dict):
        raise C2CError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _check_architecture(path: Path, content: dict[str, Any]) -> None:
    model_type = content.get("model_type")
    if model_type not in list(SUPPORTED_ARCHITECTURES):
        found = ", ".join(map(str, content.get("architectures") or [model_type]))
        known = ", ".join(SUPPORTED_ARCHITECTURES.values())
        raise C2CError(f"{path}: architecture {found} is not supported; supported are {known}")


def _check_supported(path: Path, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise C2CError(f"{path}: field quantization_config: expected an unquantised model")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise C2CError(f"{path}: field attn_logit_softcapping: softcapped attention is not supported; expected null")
    if getattr(config, "use_bidirectional_attention", False):
        raise C2CError(f"{path}: field use_bidirectional_attention: expected false, a causal language model")
    window = sliding_window_of(config)
    if window is not None and window < 1:
        raise C2CError(f"{path}: field sliding_window is {window}; expected null or at least 1 position")
    rotary = config.rope_parameters or {}
    for parameters in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROTARY:
            raise C2CError(
                f"{path}: rotary type {parameters['rope_type']} depends on the prompt's length and is not supported; "
                "supported are default, linear, llama3 and yarn"
            )
