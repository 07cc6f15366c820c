"""The level `questions` on a pair of random models: both sides alike, wrong answers named, unreadable files refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checked_bundles import context_of, trained_pair

from c2c_export.check.level import CheckContext
from c2c_export.check.levels import questions
from c2c_export.check.levels.questions import check_questions
from c2c_export.check.questions import read_questions
from c2c_export.errors import UsageError
from runtime import C2CPipeline, Session

BundleOf = Callable[[str], Path]
UNALIGNED, ALIGNED = "qwen3_from_qwen2", "qwen3_from_llama_aligned"
QUESTIONS = [
    {"question": "Which country is Lyon in?", "choices": ["Spain", "France", "Peru"], "answer": 1, "task": "city"},
    {"question": "What is 2 + 2?", "choices": ["5", "4"], "answer": 1},
    {"question": "Is water wet?", "choices": ["no", "yes, it is"], "answer": 1},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


@pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (UNALIGNED, ALIGNED)]
)
def test_both_sides_choose_alike_and_a_sharer_alone_is_asked_in_torch(pair: str, recorded_bundle: BundleOf, file: Path):
    result = check_questions(context_of(recorded_bundle(pair), pair, questions=file))
    assert result.passed
    assert [score.way for score in result.questions] == ["receiver", "sharer 0", "C2C"]
    for score in result.questions:
        assert score.num_questions == 3
        if score.way == "sharer 0":
            assert score.engine is None
            assert score.same_answers is None
        else:
            assert score.engine == score.trained
            assert score.same_answers == 1
    assert {m.name for m in result.measurements} == {
        "same answers, receiver",
        "same answers, C2C",
        "gap of another answer",
    }


@pytest.mark.xdist_group(UNALIGNED)
def test_the_share_is_that_of_the_likeliest_choice_by_a_plain_sum(recorded_bundle: BundleOf, file: Path):
    bundle = recorded_bundle(UNALIGNED)
    result = check_questions(context_of(bundle, UNALIGNED, questions=file))
    model = trained_pair(bundle, UNALIGNED).receiver.model
    pipe = C2CPipeline.from_bundle(bundle, num_threads=1, allow_unchecked=True)
    import torch

    right = 0
    for question in QUESTIONS:
        with pipe.prefill(question["question"], fuse=False) as session:
            prompt = session.token_ids.tolist()
            ids = [session.score(choice).token_ids for choice in question["choices"]]
        sums = []
        for choice in ids:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(choice)))
        right += int(np.argmax(sums)) == question["answer"]
    (receiver,) = (score for score in result.questions if score.way == "receiver")
    assert receiver.trained == pytest.approx(right / 3)


@pytest.mark.xdist_group(UNALIGNED)
def test_an_engine_that_chooses_otherwise_fails_and_the_question_is_named(
    recorded_bundle: BundleOf, file: Path, monkeypatch: pytest.MonkeyPatch
):
    context: CheckContext = context_of(recorded_bundle(UNALIGNED), UNALIGNED, questions=file)
    score = Session.score

    def inverted(self, continuation):
        found = score(self, continuation)
        return type(found)(found.token_ids, [-value for value in found.log_probabilities], found.greedy)

    monkeypatch.setattr(Session, "score", inverted)
    result = check_questions(context)
    assert not result.passed
    assert "the engine chooses" in result.divergences[0].message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ("{", "line 1"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "line 1: choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 0}\n{"question": "a"}', "line 2: choices"),
    ],
)
def test_a_file_without_questions_is_refused_with_its_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_questions(path)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="expected a JSON Lines file of questions"):
        read_questions(tmp_path / "none.jsonl")


@pytest.mark.xdist_group(UNALIGNED)
@pytest.mark.parametrize("side", ["trained", "engine"])
def test_likelihoods_that_are_no_numbers_fail_and_the_question_is_named(
    side: str, recorded_bundle: BundleOf, file: Path, monkeypatch: pytest.MonkeyPatch
):
    context = context_of(recorded_bundle(UNALIGNED), UNALIGNED, questions=file)
    if side == "trained":
        nothing = [float("nan"), float("nan"), float("nan")]
        monkeypatch.setattr(questions, "_score_choices", lambda *arguments: nothing[: len(arguments[-1])])
    else:
        score = Session.score

        def nothing_of(self, continuation):
            found = score(self, continuation)
            return type(found)(found.token_ids, [float("nan") for _ in found.log_probabilities], found.greedy)

        monkeypatch.setattr(Session, "score", nothing_of)
    result = check_questions(context)
    assert not result.passed
    assert "receiver: question 0" in result.divergences[0].message
