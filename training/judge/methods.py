"""What each method learns from a question: which answers, which of their tokens, and the loss over a batch of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mtedit_fast.training.judge.answers import Branch
from mtedit_fast.training.judge.batch import Batch, Packer, Prediction, Row
from mtedit_fast.training.judge.config import JudgeConfig
from mtedit_fast.training.judge.data import JudgeExample
from mtedit_fast.training.judge.objectives import (
    group_normalized,
    leave_one_out,
    policy_loss,
    real_advantage,
    refinement_loss,
)
from mtedit_fast.training.judge.sampling import generator_for, sample

Metrics = dict[str, list[float]]


class Totals(NamedTuple):
    """Of a whole optimizer step, for means over it however it is cut into micro-batches."""

    tokens: int
    scores: int


class Question(NamedTuple):
    """One example, the answers learned from, and how much each counts."""

    row: Row
    member: tuple[int, ...]
    """[n] which branch each of the n answers is; equal ones share theirs."""
    advantage: tuple[float, ...] = ()
    """[n], where it is known before the forward."""

    def totals(self) -> Totals:
        """Learned tokens and known scores of all n answers."""
        branches = [self.row.branches[number] for number in self.member]
        known = [score is not None for score in self.row.example.scores]
        return Totals(
            sum(len(branch.learned) for branch in branches),
            sum(known[turn] for branch in branches for _, turn in branch.slots),
        )


class Method(Protocol):
    """How examples become a loss. `questions` may sample and fills in metrics about it; `loss` is a sum over the
    micro-batch that the step's totals turn into its share of a mean."""

    def questions(self, examples: Sequence[JudgeExample], step: int, metrics: Metrics) -> list[Question]: ...

    def loss(
        self,
        questions: Sequence[Question],
        batch: Batch,
        prediction: Prediction,
        truth: Tensor,
        totals: Totals,
        metrics: Metrics,
    ) -> Tensor: ...


def new_method(config: JudgeConfig, packer: Packer) -> Method:
    if not config.samples_thoughts:
        return Imitation(config, packer)
    return Real(config, packer) if config.method.name == "real" else Accuracy(config, packer)


def truth_of(questions: Sequence[Question], batch: Batch) -> Tensor:
    """[M] fp32, the true score of every slot of the batch, NaN where unknown."""
    scores = [q.row.example.scores for q in questions for _ in q.row.branches]
    slots = zip(batch.slot_branch.tolist(), batch.slot_turn.tolist(), strict=True)
    values = [scores[branch][turn] for branch, turn in slots]
    return torch.tensor([math.nan if v is None else v for v in values], device=batch.slots.device)


def log_scores(metrics: Metrics, prediction: Prediction, truth: Tensor) -> None:
    error = (prediction.score.detach() - truth).square()
    metrics["squared_error"] += error[~truth.isnan()].tolist()
    metrics["mass"] += prediction.mass.detach().tolist()


class Imitation:
    """SFT (RAFT), TRACT and regression: cross-entropy of thought and scores, (ŷ − y)² at the scores, or both.

    L = mean over tokens of −log π + w · mean over scores of (ŷ − y)². SFT has w = 0, regression no first term. Without
    thinking, the scores are the only tokens. Of several thoughts, one is drawn anew in each step. TRACT's second stage
    is a run on thoughts that the model wrote itself (`mtedit-fast judge score --thinking`).
    """

    def __init__(self, config: JudgeConfig, packer: Packer) -> None:
        self.packer, self.seed, self.thinking = packer, config.run.seed, config.prompt.thinking
        name = config.method.name
        self.cross_entropy = name != "regression"
        self.squared_weight = {"sft": 0.0, "regression": 1.0}.get(name, config.method.squared_weight)

    def questions(self, examples: Sequence[JudgeExample], step: int, metrics: Metrics) -> list[Question]:
        result = []
        for index, example in enumerate(examples):
            if self.thinking:
                generator = generator_for(self.seed, step, index)
                number = int(torch.randint(len(example.thoughts), (), generator=generator))
                branches = [self.packer.written_branch(example, example.thoughts[number])]
                if not self.cross_entropy:
                    branches = [branch._replace(learned=()) for branch in branches]
            else:
                slots = self.packer.slot_branches(example)
                branches = [b for b, score in zip(slots, example.scores, strict=True) if score is not None]
            result.append(Question(Row(example, branches), tuple(range(len(branches)))))
        return result

    def loss(
        self,
        questions: Sequence[Question],
        batch: Batch,
        prediction: Prediction,
        truth: Tensor,
        totals: Totals,
        metrics: Metrics,
    ) -> Tensor:
        log_scores(metrics, prediction, truth)
        squared_error = (prediction.score - truth).square().sum() / totals.scores
        if not self.cross_entropy:
            return squared_error
        log_prob = torch.cat((prediction.log_prob, prediction.true_log_prob))
        metrics["cross_entropy"] += (-log_prob.detach()).tolist()
        loss = -log_prob.sum() / (totals.tokens + totals.scores)
        return loss + self.squared_weight * squared_error if self.squared_weight else loss


class _Sampled(ABC):
    """What the methods that sample answers share."""

    def __init__(self, config: JudgeConfig, packer: Packer) -> None:
        self.packer, self.config = packer, config

    @abstractmethod
    def question(self, example: JudgeExample, answers: Sequence[Sequence[int]]) -> Question:
        """answers: [n] token ids."""

    def questions(self, examples: Sequence[JudgeExample], step: int, metrics: Metrics) -> list[Question]:
        sampled = self.sample(examples, step, metrics)
        return [self.question(example, answers) for example, answers in zip(examples, sampled, strict=True)]

    def sample(self, examples: Sequence[JudgeExample], step: int, metrics: Metrics) -> list[list[list[int]]]:
        """[questions][n] token ids, written by the present weights; the random numbers depend on (seed, step) alone."""
        config = self.config.sampling
        answers = sample(
            self.packer,
            examples,
            n=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            batch=self.config.optimizer.sample_batch,
            generator=generator_for(self.config.run.seed, step, device=self.packer.device),
        )
        metrics["answer_tokens"] += [len(ids) for own in answers for ids in own]
        metrics["distinct_answers"] += [len(set(map(tuple, own))) for own in answers]
        for example, own in zip(examples, answers, strict=True):
            rewards = [self.accuracy(example, ids) for ids in own]
            metrics["accuracy"] += [reward or 0.0 for reward in rewards]
            metrics["valid"] += [reward is not None for reward in rewards]
        return answers

    def accuracy(self, example: JudgeExample, ids: Sequence[int]) -> float | None:
        """Part of the known scores that a sampled answer gets right, to the nearest value; None if it is unreadable."""
        scores = self.packer.parse(ids, len(example.edits))
        if scores is None:
            return None
        values = self.packer.scale.values
        pairs = [(got, y) for got, y in zip(scores, example.scores, strict=True) if y is not None]
        return sum(got == values[self.packer.nearest(y)] for got, y in pairs) / len(pairs)


class Accuracy(_Sampled):
    """RLOO and plain GRPO: reward 1 for a written score that is the true one (the value nearest to it) and 0 for any
    other, or for an answer that cannot be read; the mean of several turns' rewards.

    L = mean over all sampled tokens of −A·log π, A being the leave-one-out advantage or the group's z-score. A question
    whose answers all have the same reward teaches nothing and is not run.
    """

    def question(self, example: JudgeExample, answers: Sequence[Sequence[int]]) -> Question:
        normalize = leave_one_out if self.config.method.name == "rloo" else group_normalized
        rewards = torch.tensor([self.accuracy(example, ids) or 0.0 for ids in answers], dtype=torch.float64)
        branches, member = _distinct([Branch(tuple(ids), (), tuple(range(len(ids)))) for ids in answers])
        return Question(Row(example, branches), member, tuple(normalize(rewards).tolist()))

    def loss(
        self,
        questions: Sequence[Question],
        batch: Batch,
        prediction: Prediction,
        truth: Tensor,
        totals: Totals,
        metrics: Metrics,
    ) -> Tensor:
        advantage = prediction.log_prob.new_tensor([a for q in questions for a in q.advantage])
        metrics["advantage_size"] += advantage.abs().tolist()
        weight = _by_branch(advantage, questions)
        return policy_loss(prediction.log_prob, weight[batch.token_branch], totals.tokens)


class Real(_Sampled):
    """REAL: ∇E_c[r] = E_c[r·∇log π(c) + ∇r], r = −(ŷ − y)² + λ·(p(y) or log p(y)), which depends on the weights.

    The true score stands in a sampled answer's place for it, and the position before it gives ŷ and p(y), averaged
    over turns. L = the mean of −A·log π over all tokens of the thoughts but the scores, A being `real_advantage`, plus
    β times the mean of `refinement_loss` over the scores. ŷ and the gradient come from one forward. An answer without
    a readable score has p(y) = 0, the largest error the scale allows, and no part in the second term.
    """

    def question(self, example: JudgeExample, answers: Sequence[Sequence[int]]) -> Question:
        branches, member = _distinct(
            [
                self.packer.forced_branch(example, ids) or Branch(tuple(ids), (), tuple(range(len(ids))))
                for ids in answers
            ]
        )
        return Question(Row(example, branches), member)

    def loss(
        self,
        questions: Sequence[Question],
        batch: Batch,
        prediction: Prediction,
        truth: Tensor,
        totals: Totals,
        metrics: Metrics,
    ) -> Tensor:
        config = self.config.method
        log_scores(metrics, prediction, truth)
        known = ~truth.isnan()
        squared_error = (prediction.score - truth)[known].square()
        log_prob = prediction.true_log_prob[known]
        owner = batch.slot_branch[known]
        error, likelihood = self._rewards(questions, squared_error.detach(), log_prob.detach(), owner)
        advantage = real_advantage(
            error,
            likelihood,
            likelihood_weight=config.likelihood_weight,
            form=config.advantage,
            reward=config.reward,
            clip=config.advantage_clip,
        )
        metrics["advantage_size"] += advantage.abs().flatten().tolist()
        weight = _by_branch(advantage.flatten(), questions)
        loss = policy_loss(prediction.log_prob, weight[batch.token_branch], totals.tokens)
        if config.beta and len(owner):
            copies = _by_branch(torch.ones_like(advantage.flatten()), questions)[owner]
            refinement = refinement_loss(squared_error, log_prob, likelihood_weight=config.likelihood_weight)
            loss = loss + config.beta * (copies * refinement).sum() / totals.scores
        return loss

    def _rewards(
        self, questions: Sequence[Question], squared_error: Tensor, log_prob: Tensor, owner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(ŷ − y)² and log p(y) of every answer, [questions, n]: means over its turns' scores."""
        count = sum(len(question.row.branches) for question in questions)
        # A product instead of a scatter, whose order of summation CUDA leaves open.
        share = (torch.arange(count, device=owner.device)[:, None] == owner).to(squared_error)
        scores = share.sum(1)
        scored = scores > 0
        worst = torch.tensor(
            [self._worst(q.row.example) for q in questions for _ in q.row.branches], device=owner.device
        ).to(squared_error)
        scores = scores.clamp(min=1)
        error = torch.where(scored, share @ squared_error / scores, worst)
        likelihood = torch.where(scored, share @ log_prob / scores, -torch.inf)
        index = _members(questions, owner.device).view(len(questions), -1)
        return error[index], likelihood[index]

    def _worst(self, example: JudgeExample) -> float:
        values = self.packer.scale.values
        errors = [max((values[0] - y) ** 2, (values[-1] - y) ** 2) for y in example.scores if y is not None]
        return sum(errors) / len(errors)


def _distinct(branches: Sequence[Branch]) -> tuple[list[Branch], tuple[int, ...]]:
    """The different ones, and which of them each is."""
    number = {branch: index for index, branch in enumerate(dict.fromkeys(branches))}
    return list(number), tuple(number[branch] for branch in branches)


def _members(questions: Sequence[Question], device: torch.device) -> Tensor:
    """Which of the batch's branches each answer is, over all questions."""
    index, first = [], 0
    for question in questions:
        index += [first + branch for branch in question.member]
        first += len(question.row.branches)
    return torch.tensor(index, dtype=torch.int64, device=device)


def _by_branch(values: Tensor, questions: Sequence[Question]) -> Tensor:
    """Sums over the answers [answers] that are the same branch -> [branches]. These are equal, so that their order,
    which CUDA leaves open, does not matter."""
    count = sum(len(question.row.branches) for question in questions)
    return values.new_zeros(count).index_add(0, _members(questions, values.device), values)


def new_metrics() -> Metrics:
    return defaultdict(list)
