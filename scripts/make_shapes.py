"""Write randomly initialised models, and a fuser between them, in the true shapes of a published pair.

    python scripts/make_shapes.py qwen3-0.6b+qwen2.5-0.5b FOLDER [--layers N] [--dtype bfloat16] [--seed 0]

In: the name of a pair in `PAIRS`. Out: FOLDER/receiver and FOLDER/sharer, Hugging Face model folders with a tokenizer
that has every byte as a token, and FOLDER/fuser, a checkpoint with all gates open; they run as fast as the published
ones and answer nonsense. The next commands are printed. Shapes are those of the models' published config.json files,
and of recipe/train_recipe/C2C_0.6+0.5.json in thu-nics/C2C for the fuser (478 M parameters for the first pair).
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config
from transformers.initialization import no_init_weights

from c2c_export.projector import projector_shapes

_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 257,
    "bos_token_id": None,
}
_NEW = {**_QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}

# hidden size, MLP size, layers, query heads, key/value heads, vocabulary, tied embeddings
_Shape = tuple[int, int, int, int, int, int, bool]
RECEIVERS: dict[str, _Shape] = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
}
SHARERS: dict[str, _Shape] = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
}
PAIRS = [f"{receiver}+{sharer}" for receiver in RECEIVERS for sharer in SHARERS]
_RECEIVER_HEAD_DIM = 128
_FUSER = {"hidden_dim": 1024, "intermediate_dim": 1024, "num_layers": 3}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Pair:
    """The two configurations."""

    receiver: Qwen3Config
    sharer: Qwen2Config


def configs(name: str, num_layers: int | None) -> Pair:
    """The configurations of the pair `name`; `num_layers` cuts both models to as many layers."""
    receiver, sharer = name.split("+")
    return Pair(
        Qwen3Config(**_sizes(RECEIVERS[receiver], num_layers), **_NEW, head_dim=_RECEIVER_HEAD_DIM),
        Qwen2Config(**_sizes(SHARERS[sharer], num_layers), **_NEW),
    )


def _sizes(shape: _Shape, num_layers: int | None) -> dict[str, Any]:
    hidden, intermediate, layers, heads, key_value_heads, vocab, tied = shape
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def write_model(config: Any, folder: Path, dtype: torch.dtype) -> int:
    """Write a random model of `config` with its tokenizer; the number of parameters."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which is left out with the initialisation
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=_STANDARD_DEVIATION)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for every byte and the two that a chat needs."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)


def write_fuser(pair: Pair, folder: Path, dtype: torch.dtype) -> int:
    """Write a random fuser with open gates, layers linked from the last one down; the number of parameters."""
    receiver, sharer = pair.receiver, pair.sharer
    dims = {
        "source_dim": sharer.hidden_size // sharer.num_attention_heads,
        "target_dim": receiver.head_dim,
        "source_num_heads": sharer.num_key_value_heads,
        "target_num_heads": receiver.num_key_value_heads,
        **_FUSER,
    }
    (folder / "final").mkdir(parents=True, exist_ok=True)
    layers = dict(_last_aligned(receiver.num_hidden_layers, sharer.num_hidden_layers))
    num_parameters = 0
    for layer in layers:
        state = {name: _random(name, shape).to(dtype) for name, shape in projector_shapes(**dims).items()}
        num_parameters += sum(tensor.numel() for tensor in state.values())
        save_file(state, folder / "final" / f"projector_{layer}.safetensors")
        arguments = {**dims, "dropout": 0.1, "initial_temperature": 1.0, "final_temperature": 0.001}
        _write_json(folder / "final" / f"projector_{layer}.json", {"class": "C2CProjector", "init_args": arguments})
    links = {str(layer): [[source, layer]] for layer, source in layers.items()}
    _write_json(folder / "final" / "projector_config.json", {"0": {"1": links}})
    model = {"is_do_alignment": False, "alignment_strategy": "first", "mapping": "last_aligned"}
    _write_json(folder / "config.json", {"model": model})
    return num_parameters


def _last_aligned(receiver_layers: int, sharer_layers: int) -> Iterator[tuple[int, int]]:
    """Receiver and sharer layers paired from the last ones down; receiver layers below read the sharer's first."""
    for layer in range(receiver_layers):
        yield layer, max(0, layer - receiver_layers + sharer_layers)


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("gate_logit") or name.endswith("norm.weight"):
        return torch.ones(shape)
    return _STANDARD_DEVIATION * torch.randn(shape)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the pair that the command line names, and print what to do with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="cut both models to this many layers")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the files' weights")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error(f"--layers {arguments.layers}: expected at least 1")
    receiver, sharer = arguments.pair.split("+")
    most = min(RECEIVERS[receiver][2], SHARERS[sharer][2])
    if arguments.layers is not None and arguments.layers > most:
        parser.error(f"--layers {arguments.layers}: expected at most {most}, which both models have")
    for name in ("receiver", "sharer", "fuser"):
        if (arguments.folder / name).exists():
            parser.error(f"{arguments.folder / name} is there already; name another folder, or remove it")
    folder, dtype = arguments.folder, getattr(torch, arguments.dtype)
    torch.manual_seed(arguments.seed)
    pair = configs(arguments.pair, arguments.layers)
    for name, config in (("receiver", pair.receiver), ("sharer", pair.sharer)):
        print(f"{folder / name}: {write_model(config, folder / name, dtype) / 1e6:.0f} M parameters")
    print(f"{folder / 'fuser'}: {write_fuser(pair, folder / 'fuser', dtype) / 1e6:.0f} M parameters")
    print(
        f"Next: c2c-export pair --receiver {folder}/receiver --sharer {folder}/sharer --fuser {folder}/fuser "
        f"-o {folder}/bundle --max-length 1024\n"
        f"then: c2c-export bench {folder}/bundle --prompt-tokens 512 --roofline --reference PATH_TO_THU_NICS_C2C"
    )


if __name__ == "__main__":
    main()
