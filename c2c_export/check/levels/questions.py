"""Level `questions`: a score that means something to users: the share of questions answered right.

Each question is asked as one user turn, and the likeliest choice counts as the answer: the one whose text has the
highest log-probability as the beginning of the reply (the sum over its tokens). Asked are the receiver alone, each
sharer alone, and all together (C2C), in torch and on the engine. A sharer alone is asked in torch only: a bundle's
sharer has no LM head.

    same answers, <way>      the share of questions on which both sides choose alike
    gap of another answer    where they do not, how much likelier (in nats) the trained models' own choice is to them;
                             the largest

Both sides are given the same tokens. Not covered: generated answers, and choices that must be told apart by more than
the beginning of a reply.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.questions import Question, read_questions
from c2c_export.check.report import QuestionScore
from c2c_export.check.tolerances import measured
from c2c_export.check.trained.answer import TrainedAnswers
from c2c_export.check.trained.decoder import CachedRows
from c2c_export.check_record import Divergence
from c2c_export.tokenizer import BundledTokenizer
from runtime.messages import Message
from runtime.prompt import Plan, PromptPlanner
from runtime.score import score_tokens

_GAP = "gap of another answer"


@dataclass
class _Way:
    """One way to answer, question by question."""

    name: str
    trained: list[int] = field(default_factory=list)
    engine: list[int] = field(default_factory=list)
    """Empty for a sharer alone."""
    gaps: list[float] = field(default_factory=list)

    def add(self, trained: Sequence[float], engine: Sequence[float] | None) -> None:
        """Log-likelihoods of the choices of one more question."""
        own = int(np.argmax(trained))
        self.trained.append(own)
        if engine is not None:
            other = int(np.argmax(engine))
            self.engine.append(other)
            # An engine that gives no number chooses nothing.
            self.gaps.append(trained[own] - trained[other] if not np.isnan(engine).any() else float("nan"))


def check_questions(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `UsageError` for a file of questions that cannot be read or asked."""
    assert context.options.questions is not None
    questions = read_questions(context.options.questions)
    ways = [_ask_both(context, questions, "receiver", fuse=False)]
    numbers = range(len(context.bundle.manifest.sharers))
    if numbers:
        ways += [_ask_sharer(context, questions, number) for number in numbers]
        ways.append(_ask_both(context, questions, "C2C", fuse=True))
    scores = [_score(way, questions) for way in ways]
    precision = context.record.precision
    gap = measured("questions", _GAP, precision, float(np.max([gap for way in ways for gap in way.gaps])))
    same = [
        measured("questions", f"same answers, {score.way}", precision, score.same_answers)
        for score in scores
        if score.same_answers is not None
    ]
    first = None if gap.passed else _first(ways, questions, gap.value)
    return LevelResult([*same, gap], [] if first is None else [first], questions=scores)


def _ask_both(context: CheckContext, questions: Sequence[Question], name: str, *, fuse: bool) -> _Way:
    way, pair = _Way(name), context.trained
    for question in questions:
        with context.engine.pipeline.prefill(question.question, fuse=fuse) as session:
            found = [session.score(choice) for choice in question.choices]
            plan = session.plan
        ids = [score.token_ids for score in found]
        # Not the pair's own answers, which would keep every question's caches.
        answers = TrainedAnswers(pair.receiver, pair.sharers, pair.fusers)
        trained = _score_choices(answers, plan, context, ids)
        way.add(trained, [score.log_likelihood for score in found])
    return way


def _ask_sharer(context: CheckContext, questions: Sequence[Question], number: int) -> _Way:
    """A sharer as a model of its own, on its own prompt."""
    way, bundle = _Way(f"sharer {number}"), context.bundle
    folder = bundle.tokenizer_folder(number if bundle.manifest.aligned else None)
    planner = PromptPlanner(BundledTokenizer.load(folder), [], [], aligned=False)
    for question in questions:
        messages = [Message("user", question.question)]
        plan = planner.plan_messages(messages, sharers=())
        ids = [planner.continuation_ids(messages, [], [], choice) for choice in question.choices]
        answers = TrainedAnswers(context.trained.sharers[number], [], [])
        way.add(_score_choices(answers, plan, context, ids), None)
    return way


def _score_choices(
    answers: TrainedAnswers, plan: Plan, context: CheckContext, choices: Sequence[Sequence[int]]
) -> list[float]:
    """The log-likelihood of each choice's tokens behind the prompt, in torch."""
    prompt = answers.prefill(plan, context.bundle.manifest.fusion_mode)
    return [
        score_tokens(prompt.logits, choice, _stepper(answers, prompt.rows, prompt.next_position)).log_likelihood
        for choice in choices
    ]


def _stepper(
    answers: TrainedAnswers, rows: CachedRows, next_position: int
) -> Callable[[int, int], NDArray[np.float32]]:
    """What `score_tokens` calls to run token i in torch; each stepper has rows of its own."""
    current = rows

    def step(index: int, token_id: int) -> NDArray[np.float32]:
        nonlocal current
        current, logits = answers.receiver.extend(current, [token_id], [next_position + index])
        return logits

    return step


def _score(way: _Way, questions: Sequence[Question]) -> QuestionScore:
    right = [question.answer for question in questions]
    return QuestionScore(
        way=way.name,
        trained=_share(way.trained, right),
        engine=_share(way.engine, right) if way.engine else None,
        same_answers=_share(way.engine, way.trained) if way.engine else None,
        num_questions=len(questions),
    )


def _share(answers: Sequence[int], expected: Sequence[int]) -> float:
    return float(np.mean(np.array(answers) == np.array(expected)))


def _first(ways: Sequence[_Way], questions: Sequence[Question], gap: float) -> Divergence:
    """The question whose answers differ most."""
    way = next(way for way in ways if gap in way.gaps or (np.isnan(gap) and np.isnan(way.gaps).any()))
    number = int(np.argmax(way.gaps))  # of what is no number the first
    question = questions[number]
    return Divergence(
        message=f"{way.name}: question {number} ({question.question:.60}): the engine chooses "
        f"{question.choices[way.engine[number]]!r}, the trained models {question.choices[way.trained[number]]!r}, "
        f"which is likelier to them by {gap:.3g} nats"
    )
