"""The research code, thu-nics/C2C, in a process of its own: a request on standard input, what was measured on output.

Run as a file (`python -P reference_process.py`), it needs the checkout's libraries and none of ours: torch,
transformers, safetensors. Models and fusers are loaded as the checkout's `load_rosetta_model` does, but in float32, and
called through its `generate`; nothing of it is changed but two things that newer versions of transformers took away
(`_restore_cache_lists`, `_TimedModel`), without which it does not run there. Sharers whose gates are all closed are run
by the research code as any other.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NO_TOKEN = -1


@dataclass(frozen=True)
class ReferencePrompt:
    """A padded prompt, as the research code reads it: one row of ids per model, all of one length."""

    ids: list[list[int]]
    """The receiver's, then each sharer's."""
    attention_masks: list[list[int]]
    """Likewise; 0 is padding."""
    sections: list[tuple[int, bool]]
    """Length of each section, and whether it is fused."""


@dataclass(frozen=True)
class ReferenceRequest:
    """What to load and to run; folders are local and in Hugging Face's layout, a fuser's is that of config.json."""

    checkout: str
    receiver: str
    sharers: list[str]
    fusers: list[str]
    fusion_mode: str
    threads: int
    new_tokens: int
    repeats: int
    prompts: list[ReferencePrompt]


@dataclass(frozen=True)
class ReferenceRun:
    """One prompt: seconds of each repeat, of each step of all repeats, and the tokens that were generated."""

    ttft: list[float]
    sharer_prefill: list[float]
    receiver_prefill: list[float]
    steps: list[float]
    token_ids: list[int]


@dataclass(frozen=True)
class ReferenceResult:
    """What the process answers."""

    versions: dict[str, str]
    peak_bytes: int
    runs: list[ReferenceRun]


def parse_request(text: str) -> ReferenceRequest:
    """A request from its JSON."""
    content = json.loads(text)
    return ReferenceRequest(**{**content, "prompts": [ReferencePrompt(**prompt) for prompt in content["prompts"]]})


def measure(request: ReferenceRequest) -> ReferenceResult:
    """Load the models and measure every prompt, after one run that is not counted."""
    import torch
    import transformers

    sys.path.insert(0, request.checkout)
    torch.set_num_threads(request.threads)
    _restore_cache_lists()
    model, seconds = _load(request)
    runs = []
    for prompt in request.prompts:
        repeats = [_generate(model, prompt, request.new_tokens, seconds) for _ in range(request.repeats + 1)][1:]
        runs.append(
            ReferenceRun(
                ttft=[repeat.ttft for repeat in repeats],
                sharer_prefill=[repeat.sharer_prefill for repeat in repeats],
                receiver_prefill=[repeat.receiver_prefill for repeat in repeats],
                steps=[step for repeat in repeats for step in repeat.steps],
                token_ids=repeats[0].token_ids,
            )
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return ReferenceResult({"torch": torch.__version__, "transformers": transformers.__version__}, peak, runs)


@dataclass(frozen=True)
class _Repeat:
    """One call of `generate`: seconds, those of each step after the first token too, and the tokens."""

    ttft: float
    sharer_prefill: float
    receiver_prefill: float
    steps: list[float]
    token_ids: list[int]


class _Clock:
    """What `generate` streams its tokens to: the moment of each, and what the models had computed at the first."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds
        self.at_first_token: list[float] = []
        self.moments: list[float] = []
        self.ids: list[int] = []

    def put(self, ids: Any) -> None:
        if ids.numel() == 1:  # the prompt comes first, in one piece
            self.moments.append(time.perf_counter())
            self.ids.append(int(ids))
            if len(self.ids) == 1:
                self.at_first_token = list(self._seconds)

    def end(self) -> None:
        pass


class _TimedModel:
    """A model's `forward` that adds up its seconds, by the model's number."""

    def __init__(self, model: Any, seconds: list[float], number: int) -> None:
        self._forward, self._seconds, self._number = model.forward, seconds, number

    def __call__(self, **options: Any) -> Any:
        started = time.perf_counter()
        past, mask = options.get("past_key_values"), options.get("attention_mask")
        if past is not None and mask is not None:
            width = past.get_seq_length() + options["input_ids"].shape[1]
            # The research code cuts a step's mask to one column. Up to transformers 4.52 that meant none at all,
            # later ones would mask every row but the first.
            if mask.shape[1] < width:
                options["attention_mask"] = None
        try:
            return self._forward(**options)
        finally:
            self._seconds[self._number] += time.perf_counter() - started


def _load(request: ReferenceRequest) -> tuple[Any, list[float]]:
    """The research code's model, and the seconds that each of its models computed so far."""
    from rosetta.model.projector import load_projector  # type: ignore[import-not-found]
    from rosetta.model.wrapper import RosettaModel  # type: ignore[import-not-found]

    models = [_load_model(Path(folder)) for folder in (request.receiver, *request.sharers)]
    projectors: list[Any] = []
    links = []
    for number, folder in enumerate(request.fusers):
        weights = Path(folder) / "final"
        weights = weights if weights.is_dir() else Path(folder)
        (layers,) = json.loads((weights / "projector_config.json").read_text())["0"].values()
        first = len(projectors)
        count = len(list(weights.glob("projector_*.json"))) - 1
        for index in range(count):
            projector = load_projector(str(weights / f"projector_{index}.json"))
            projector.load_state_dict(_state_of(weights, index), strict=False)
            projectors.append(projector)
        links += [(number + 1, int(t), m, first + index) for t, pairs in layers.items() for m, index in pairs]
    model = RosettaModel(
        model_list=models, base_model_idx=0, projector_list=projectors, multi_source_fusion_mode=request.fusion_mode
    ).eval()
    for sharer, receiver_layer, sharer_layer, projector in links:
        model.set_projector_config(sharer, sharer_layer, 0, receiver_layer, projector)
    seconds = [0.0] * len(models)
    for number, part in enumerate(models):
        part.forward = _TimedModel(part, seconds, number)
    return model, seconds


def _load_model(folder: Path) -> Any:
    import torch
    import transformers

    old = int(transformers.__version__.split(".")[0]) < 5
    config = transformers.AutoConfig.from_pretrained(folder)
    if old:
        _read_rotary_parameters(config, json.loads((folder / "config.json").read_text()))
    dtype = {"torch_dtype" if old else "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, **dtype).eval()


def _read_rotary_parameters(config: Any, content: dict[str, Any]) -> None:
    """Give transformers 4 the rotary base that version 5 writes to another field."""
    rotary = content.get("rope_parameters") or {}
    if "full_attention" in rotary:
        config.rope_local_base_freq = rotary["sliding_attention"]["rope_theta"]
        rotary = rotary["full_attention"]
    if "rope_theta" in rotary:
        config.rope_theta = rotary["rope_theta"]
    if rotary.get("rope_type", "default") != "default":
        config.rope_scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}


def _state_of(folder: Path, index: int) -> Any:
    path = folder / f"projector_{index}.safetensors"
    if path.is_file():
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    return torch.load(folder / f"projector_{index}.pt", map_location="cpu", weights_only=True)


def _generate(model: Any, prompt: ReferencePrompt, new_tokens: int, seconds: list[float]) -> _Repeat:
    """One call of the research code's `generate`."""
    import torch

    all_sharers = (1 << (len(prompt.ids) - 1)) - 1
    sections = [
        torch.tensor([all_sharers if fused else -1, 0]).repeat(length, 1).unsqueeze(0)
        for length, fused in prompt.sections
    ]
    clock = _Clock(seconds)
    before = list(seconds)
    started = time.perf_counter()
    model.generate(
        kv_cache_index=sections,
        input_ids=[torch.tensor([row]) for row in prompt.ids],
        attention_mask=[torch.tensor([mask]) for mask in prompt.attention_masks],
        max_new_tokens=new_tokens,
        eos_token_id=_NO_TOKEN,
        pad_token_id=0,
        do_sample=False,
        streamer=clock,
    )
    spent = [after - earlier for after, earlier in zip(clock.at_first_token, before, strict=True)]
    steps = [after - earlier for earlier, after in zip(clock.moments, clock.moments[1:], strict=False)]
    return _Repeat(clock.moments[0] - started, sum(spent[1:]), spent[0], steps, clock.ids)


def _restore_cache_lists() -> None:
    """Give `DynamicCache` the lists of keys and values, by layer, that transformers had until version 4.56."""
    from transformers.cache_utils import DynamicCache

    if hasattr(DynamicCache(), "key_cache"):
        return
    from transformers.cache_utils import DynamicLayer

    class Tensors:
        def __init__(self, cache: Any, name: str) -> None:
            self._cache, self._name = cache, name

        def __len__(self) -> int:
            return len(self._cache.layers)

        def __getitem__(self, layer: int) -> Any:
            return getattr(self._cache.layers[layer], self._name)

        def __iter__(self) -> Iterator[Any]:
            return (getattr(layer, self._name) for layer in self._cache.layers)

        def append(self, tensor: Any) -> None:
            layers = self._cache.layers
            if not layers or getattr(layers[-1], self._name) is not None:
                layers.append(DynamicLayer())
            setattr(layers[-1], self._name, tensor)
            layers[-1].is_initialized = True

    def pair_of(cache: Any, layer: int) -> tuple[Any, Any]:
        return cache.layers[layer].keys, cache.layers[layer].values

    initialise: Callable[..., None] = DynamicCache.__init__

    def without_windows(cache: Any, *arguments: Any, **options: Any) -> None:
        # Else layers with a sliding window keep no more rows than that, while a fuser's sections count all of them.
        options.pop("config", None)
        initialise(cache, *arguments, **options)

    DynamicCache.__init__ = without_windows
    DynamicCache.key_cache = property(lambda cache: Tensors(cache, "keys"))
    DynamicCache.value_cache = property(lambda cache: Tensors(cache, "values"))
    DynamicCache.__getitem__ = pair_of


def main() -> None:
    """Answer the request on standard input; libraries that print, in C too, do so to standard error."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        result = measure(parse_request(sys.stdin.read()))
        json.dump(dataclasses.asdict(result), output)


if __name__ == "__main__":
    main()
