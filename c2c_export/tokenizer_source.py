"""The exporting side of tokenizers: from a Hugging Face model folder to the three files of a bundle.

In: a model folder, and where a chat template may come from. Out: a folder that `c2c_export.tokenizer` reads, whose
tokenizer encodes and decodes exactly as the transformers tokenizer does. Not covered: tokenizers that exist only as
Python code, or that need code from the model's own repository.
"""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from c2c_export.chat_template import compile_template
from c2c_export.errors import C2CError, UsageError
from c2c_export.tokenizer import CHAT_TEMPLATE_NAME, SPECIAL_TOKENS_NAME, TOKENIZER_NAME, SpecialTokens

# The two templates that the reference gives to models without one. Spaces and line ends count: a fuser was trained
# with them.
_DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}### Human: {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}### Assistant: {{ message['content'] }}{% endif %}"
    "{% if not loop.last %}\n    {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}\n    ### Assistant:{% endif %}"
)
_ULIZA_LLAMA3_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] }}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of a model folder; nothing is downloaded.

    Raises `C2CError` when the folder has none, when it is broken, or when the `tokenizers` library cannot run it.
    """
    if not folder.is_dir():
        raise C2CError(f"{folder}: no such folder; expected a Hugging Face model folder with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the broken file leads to
        reason = str(error).strip().partition("\n")[0]
        raise C2CError(f"{folder}: its tokenizer cannot be loaded ({reason}); expected a {TOKENIZER_NAME}") from error
    if not tokenizer.is_fast:
        raise C2CError(
            f"{folder}: its tokenizer {type(tokenizer).__name__} has no fast form; add a {TOKENIZER_NAME} to the folder"
        )
    return tokenizer


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str, folder: Path) -> None:
    """Write `tokenizer` and `chat_template` into `folder`, which is made if need be, for `BundledTokenizer.load`.

    Raises `C2CError` for a tokenizer that is set to split special tokens, which a tokenizer.json cannot say.
    """
    if tokenizer.split_special_tokens:
        raise C2CError(
            f"{tokenizer.name_or_path}: split_special_tokens is set, expected unset: a chat prompt needs its special "
            "tokens; remove it from tokenizer_config.json"
        )
    # A copy, so that the caller's tokenizer keeps its padding and truncation.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    folder.mkdir(parents=True, exist_ok=True)
    # Not backend.save(), which reports a full disk as a bare Exception.
    (folder / TOKENIZER_NAME).write_bytes(backend.to_str(pretty=True).encode("utf-8"))
    special = _special_tokens(tokenizer)
    (folder / SPECIAL_TOKENS_NAME).write_text(special.model_dump_json(indent=1) + "\n", encoding="utf-8")
    # As bytes, because write_text() would write \n as the platform's line end.
    (folder / CHAT_TEMPLATE_NAME).write_bytes(chat_template.encode("utf-8"))


def choose_chat_template(
    tokenizer: PreTrainedTokenizerBase, model_name: str, override: Path | None, trained_with: Path | None
) -> tuple[str, str]:
    """The chat template of a model, and a short text that says where it came from.

    In this order: the file `override` that the user gave; the file `trained_with` that came with the fuser; the
    model's own (of several the one named "default"); what the reference uses for a model without one, which depends on
    `model_name`. Raises `UsageError` when `override` cannot be read, `C2CError` when the chosen template does not
    compile, or when the model has several and none is the default.
    """
    if override is not None:
        template, origin = _read_template(override, UsageError), f"file {override}"
    elif trained_with is not None:
        template, origin = _read_template(trained_with, C2CError), f"file {trained_with}"
    elif tokenizer.chat_template is not None:
        template, origin = _own_template(tokenizer, model_name), "model"
    else:
        uliza = "ulizallama3" in model_name.lower()
        template, origin = (_ULIZA_LLAMA3_TEMPLATE if uliza else _DEFAULT_TEMPLATE), "reference default"
    compile_template(template, model_name if origin == "model" else origin)
    return template, origin


def _own_template(tokenizer: PreTrainedTokenizerBase, model_name: str) -> str:
    own = tokenizer.chat_template
    if isinstance(own, str):
        return own
    if "default" not in own:
        raise C2CError(
            f"{model_name}: its chat templates are {', '.join(sorted(own))}, expected one named default; "
            "give the template to use as a file"
        )
    return own["default"]


def _read_template(path: Path, error_class: type[C2CError]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise error_class(f"{path}: no such file; expected a chat template") from error
    except UnicodeDecodeError as error:
        raise error_class(f"{path}: not UTF-8 text (byte {error.start}); expected a chat template") from error
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error.strerror}); expected a chat template") from error


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    variables = dict(tokenizer.special_tokens_map)
    # The reference gives a tokenizer without a padding token its end token, before it renders any template.
    if "pad_token" not in variables and "eos_token" in variables:
        variables["pad_token"] = variables["eos_token"]

    def id_of(role: str) -> int | None:
        token = variables.get(role)
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return SpecialTokens(
        padding_id=id_of("pad_token"),
        end_id=id_of("eos_token"),
        begin_id=id_of("bos_token"),
        unknown_id=id_of("unk_token"),
        special_ids=tuple(sorted({i for i in tokenizer.all_special_ids if i is not None})),
        template_variables=variables,
        # transformers ignores the setting for byte-pair encodings, where it would eat spaces of the text
        clean_up_spaces=tokenizer.clean_up_tokenization_spaces and (forced or not is_bpe),
    )
