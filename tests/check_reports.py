"""Reports of checks that never ran, as large and as odd as a test asks for; the same in every run."""

import random
from collections.abc import Sequence
from typing import Any

from c2c_export.check.report import (
    CacheError,
    CheckReport,
    EngineReport,
    LayerCaches,
    ProjectorDetails,
    PromptDetails,
    QuestionScore,
    TokenLogit,
)
from c2c_export.check_record import CheckRecord, Divergence, LevelRecord, Measurement

QUESTION = "Which country is the city of Kazan in?"
ANSWER = " Kazan is the capital of the Republic of Tatarstan, in Russia."
OTHER_ANSWER = " Kazan is the capital of Kazakhstan.\nIt lies on the Volga."


def make_report(layers: int = 4, heads: int = 2, prompts: int = 2, sharers: int = 1) -> CheckReport:
    """One engine that passed and one whose level `caches` failed, with every section filled."""
    passed = make_engine("ort-cpu", "fp32", True, layers, heads, prompts, sharers, 1e-6)
    failed = make_engine("ort-cpu", "int4", False, layers, heads, prompts, sharers, 3e-2)
    return CheckReport(
        bundle="/bundles/demo.bundle",
        receiver="smollm2.gguf (LlamaForCausalLM)",
        sharers=tuple(f"gemma-3-270m-{number}.gguf (Gemma3ForCausalLM)" for number in range(sharers)),
        fusers=tuple(f"demo_fuser{number}" for number in range(sharers)),
        engines=(passed, failed),
    )


def make_engine(
    target: str, precision: str, passes: bool, layers: int, heads: int, prompts: int, sharers: int, error: float
) -> EngineReport:
    """One engine whose errors are about `error`."""
    chance = random.Random(f"{target}-{precision}")
    return EngineReport(
        engine=f"{target}-{precision}",
        target=target,
        precision=precision,
        check=make_check(passes, prompts, error),
        caches=tuple(
            LayerCaches(layer=layer, key=_cache(chance, heads, layer, error), value=_cache(chance, heads, layer, error))
            for layer in range(layers)
        ),
        projectors=tuple(
            _projector(random.Random(f"{sharer}-{layer}"), sharer, layer, layers)
            for sharer in range(sharers)
            for layer in range(layers)
        ),
        prompts=tuple(_prompt(chance, number, passes or number % 3 != 1, error) for number in range(prompts)),
        questions=(
            QuestionScore(way="receiver", trained=0.3125, engine=0.3125, same_answers=1.0, num_questions=64),
            QuestionScore(way="sharer 0", trained=0.5625, engine=None, same_answers=None, num_questions=64),
            QuestionScore(way="C2C", trained=0.4375, engine=0.421875, same_answers=0.953125, num_questions=64),
        ),
    )


def make_check(passes: bool, prompts: int, error: float) -> CheckRecord:
    """A check of four levels; where it does not pass, `caches` and `generation` failed."""
    divergence = Divergence(
        graph="receiver",
        layer=2,
        kind="key",
        head=1,
        token=17,
        message="The fused key is off by 0.0312, expected at most 0.02; it equals the trained model's value there.",
    )
    levels: Sequence[LevelRecord] = (
        LevelRecord(name="sources", passed=True, seconds=0.41),
        LevelRecord(
            name="caches",
            passed=passes,
            seconds=12.5,
            measurements=(
                Measurement(name="max error", value=error * 1.04, at_most=error * (1.5 if passes else 0.5)),
                Measurement(name="mean error", value=error / 90, at_most=error / 10),
                Measurement(name="fused tokens", value=431.0),
            ),
            divergences=() if passes else (divergence,),
        ),
        LevelRecord(
            name="logits",
            passed=True,
            seconds=3.25,
            measurements=(
                Measurement(name="KL divergence", value=error * 0.002, at_most=0.01),
                Measurement(name="top-1 agreement", value=1.0 if passes else 0.96875, at_least=0.9),
            ),
        ),
        LevelRecord(
            name="generation",
            passed=passes,
            seconds=33.0,
            measurements=(Measurement(name="mean common prefix", value=32.0 if passes else 5.5, at_least=8.0),),
        ),
    )
    return CheckRecord(
        passed=passes,
        date="2026-11-27T08:15:30Z",
        versions={"torch": "2.13.0", "onnxruntime": "1.32.0"},
        calibration="built in",
        num_prompts=prompts,
        levels=tuple(levels),
    )


def with_first_engine(report: CheckReport, **changes: Any) -> CheckReport:
    """`report` with other values in its first engine."""
    first, *rest = report.engines
    return report.model_copy(update={"engines": (first.model_copy(update=changes), *rest)})


def _cache(chance: random.Random, heads: int, layer: int, error: float) -> CacheError:
    by_head = tuple(error * 10 ** chance.uniform(-2, 0) * (1 + layer / 10) for _ in range(heads))
    largest = max(by_head)
    return CacheError(
        max_error=largest, mean_error=largest / 30, relative_error=largest / 9 * (layer + 1), head_errors=by_head
    )


def _projector(chance: random.Random, sharer: int, layer: int, layers: int) -> ProjectorDetails:
    key, value = chance.gauss(1, 1), chance.gauss(1, 1)
    return ProjectorDetails(
        sharer=sharer,
        receiver_layer=layer,
        sharer_layer=layer * 18 // layers,
        projector=layer,
        key_gate_logit=key,
        value_gate_logit=value,
        key_gate_open=key > 0,
        value_gate_open=value > 0,
        key_weight=chance.uniform(0.2, 0.9),
        value_weight=chance.uniform(0.2, 0.9),
    )


def _prompt(chance: random.Random, number: int, equal: bool, error: float) -> PromptDetails:
    words = (" Kazan", "\n\n", " the", "The", " Russia", "\tis")
    trained = tuple(
        TokenLogit(token_id=311 + 7 * rank, text=words[rank], logit=18.25 - rank * chance.uniform(0.5, 2))
        for rank in range(5)
    )
    moved = tuple(token.model_copy(update={"logit": token.logit + error}) for token in trained)
    lost = TokenLogit(token_id=9009, text=words[5], logit=19.5)
    return PromptDetails(
        prompt=QUESTION if number % 2 == 0 else "Übersetze ins Englische: „Der Zug fährt um 7:45 Uhr ab.“ 谢谢! 🚆",
        num_tokens=31 + number,
        max_error=error * 1.7,
        mean_error=error * 0.21,
        kl_divergence=error**2,
        top1_equal=equal,
        top5_shared=5 if equal else 4,
        trained_top5=trained,
        engine_top5=moved if equal else (lost, *moved[:4]),
        trained_text=ANSWER,
        engine_text=ANSWER if equal else OTHER_ANSWER,
        common_prefix=32 if equal else 6,
        num_generated=32,
    )
