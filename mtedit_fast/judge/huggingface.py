"""A judge that is a vision-language model of transformers in this process."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.ops import digit_score
from mtedit_fast.qwen_vl import ImageSpec

from .prefill import FAMILIES, Group, Prefill, new_group
from .processor import Processed
from .prompts import JudgePrompt, parse_answer
from .sampling import continue_answers, sample_answers, stops
from .scores import JudgeScores, Rows, check_rows, finished, invalid_scores, sample_statistics
from .sequence import Question, encode, score_token_ids, split_question

__all__ = ["HuggingFaceJudge"]


class HuggingFaceJudge:
    """A `Judge` with a model of transformers: the expected score without decoding, or written answers.

    With Qwen2-VL, Qwen2.5-VL and Qwen3-VL, a group's common part (rubric, reference, instructions) goes through the
    model once and a reference through the vision tower once; the edited images of all members, and the K places where
    an answer states a score, follow in one forward per micro-batch. A place sees the question and the beginning of its
    own answer, and no other turn's score. Images stay on the device. Other chat models are judged through their own
    processor, with nothing shared.

    Args:
        model: a ForConditionalGeneration in eval mode, with LoRA or without. Its vision tower is set to attend to all
            images of a call at once where it is on "sdpa"; the language model has to be on "sdpa" or "eager".
        tokenizer: the model's, with a chat template that takes images.
        images: the model's `ImageSpec`, or, for a model of another family, its processor.
        prompt: the question; `prompt.thinking` has answers sampled and read instead of an expectation.
        normalize: "set", probabilities among the score tokens, or "vocab", within the vocabulary (`ops.digit_score`).
        temperature: of the score tokens; when thinking, of the sampling, where 0 takes the likeliest token.
        min_mass: below this mass of the score tokens a score is invalid; needs normalize="vocab". When thinking, the
            least part of the samples that has to be readable.
        share_prefix: False runs every row's whole question (images are still encoded once).
        max_tokens: of a forward (default: 32768, on a CPU 4096). Where CUDA runs out of memory, it is halved once in a
            call, with a warning, and stays so.
        samples, top_p, max_new_tokens, seed: of the written answers per row. The same call gives the same ones; beside
            other rows, or with another max_tokens, a row may get others.

    Attributes: those arguments, and counts, of the last call: "images" encoded, "prefixes" prefilled, "rows",
    "forwards" of the language model without decoding steps, "vision_forwards".
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        images: ImageSpec | Any,
        prompt: JudgePrompt = JudgePrompt(),
        *,
        normalize: str = "set",
        temperature: float = 1.0,
        min_mass: float = 0.0,
        share_prefix: bool = True,
        max_tokens: int | None = None,
        samples: int = 1,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        if normalize not in ("set", "vocab"):
            raise ValueError(f"normalize must be 'set' or 'vocab', got {normalize!r}")
        if min_mass > 0 and normalize == "set" and not prompt.thinking:
            raise ValueError(f"min_mass={min_mass} needs normalize='vocab': 'set' never looks at other tokens")
        if not 0 <= min_mass <= 1:
            raise ValueError(f"min_mass must be within 0…1, got {min_mass}")
        if temperature < 0 or (temperature == 0 and not prompt.thinking):
            raise ValueError(f"temperature must be positive, got {temperature}")
        for name, value in (("samples", samples), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.model, self.tokenizer, self.images, self.prompt = model, tokenizer, images, prompt
        self.normalize, self.temperature, self.min_mass = normalize, temperature, min_mass
        self.share_prefix, self.samples, self.top_p = share_prefix, samples, top_p
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self._inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.max_tokens = max_tokens or (4096 if self._inner.device.type == "cpu" else 32768)
        self.counts: Counter[str] = Counter()
        if isinstance(images, ImageSpec):
            self._prefill()  # raises for models it cannot take
        elif not hasattr(images, "apply_chat_template") or not hasattr(images, "tokenizer"):
            raise TypeError(f"images must be an ImageSpec or the model's processor, got {type(images).__name__}")
        if not prompt.thinking:
            _check_head(self._inner)
            score_token_ids(tokenizer, prompt.answers, prompt.openings(1)[0])

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        prompt: JudgePrompt = JudgePrompt(),
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        attn_implementation: str | dict[str, str] = "sdpa",
        **options: Any,
    ) -> HuggingFaceJudge:
        """From a folder or a model of the Hub. device: "cuda" where there is one. options: as of the class."""
        from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        if model.config.model_type in FAMILIES:
            images = ImageSpec.from_pretrained(path)
            return cls(model, AutoTokenizer.from_pretrained(path), images, prompt, **options)
        processor = AutoProcessor.from_pretrained(path)
        return cls(model, processor.tokenizer, processor, prompt, **options)

    @torch.no_grad()
    def score(
        self,
        references: Tensor | Sequence[Tensor],
        edits: Tensor | Sequence[Tensor],
        instructions: Sequence[Sequence[str]],
        *,
        owner: Sequence[int] | None = None,
    ) -> JudgeScores:
        """As `Judge.score`. The same call gives the same numbers, bit for bit; with other rows beside it a row's
        numbers differ by what the batch's shape changes in the model's sums.

        Raises:
            TypeError, ValueError: arguments that do not fit together, a model in training mode, a chat template without
                images, a tokenizer that splits a score.
        """
        rows = check_rows(references, edits, instructions, owner)
        if len(rows.edits) and rows.device.type != self._inner.device.type:
            raise ValueError(
                f"references and edits must be on the model's device {self._inner.device}, got {rows.device}"
            )
        if self._inner.training:
            raise ValueError("model is in training mode, where dropout makes scores random: call model.eval()")
        run = self._written if self.prompt.thinking else self._expected
        try:
            self.counts.clear()
            return run(rows)
        except torch.OutOfMemoryError:
            halved = self.max_tokens // 2
            warnings.warn(f"out of memory: max_tokens is now {halved} instead of {self.max_tokens}", stacklevel=2)
            self.max_tokens = halved
        torch.cuda.empty_cache()  # here, where the failed run's tensors are no longer held by its traceback
        self.counts.clear()
        return run(rows)

    def _expected(self, rows: Rows) -> JudgeScores:
        fields, failures = invalid_scores(rows)
        if rows.usable:
            openings = self.prompt.openings(rows.turns)
            head = self._inner.get_output_embeddings()
            hidden = head.weight.new_zeros(len(rows.edits), rows.turns, head.weight.shape[1])
            for index, states in self._states(rows, openings):
                hidden[index] = states
            usable = torch.tensor(rows.usable, device=rows.device)
            same: dict[tuple[int, ...], list[int]] = {}
            for turn, opening in enumerate(openings):
                same.setdefault(score_token_ids(self.tokenizer, self.prompt.answers, opening), []).append(turn)
            for ids, turns in same.items():
                at = (usable[:, None], torch.tensor(turns, device=rows.device))
                result = digit_score(
                    hidden[at].flatten(0, 1),
                    head.weight,
                    ids,
                    self.prompt.answers.values,
                    normalize=self.normalize,
                    temperature=self.temperature,
                    bias=getattr(head, "bias", None),
                )
                for name, field in fields.items():
                    if (value := getattr(result, name)) is not None:
                        field[at] = value.view(len(usable), len(turns)).float()
            self._invalidate(fields, failures, usable)
        return finished(fields, failures)

    def _states(self, rows: Rows, openings: Sequence[str]) -> Any:
        """(index into [B, K], hidden states there) of all usable rows, a batch at a time."""
        if isinstance(self.images, ImageSpec):
            for answers in self._prefill().answers(rows, self._groups(rows)):
                yield torch.tensor(answers.rows, device=answers.hidden.device), answers.hidden
        else:
            for part, states in self._processed().hidden(rows, openings):
                yield torch.tensor(part, device=states.device).unbind(1), states

    def _invalidate(self, fields: dict[str, Tensor], failures: Counter[str], usable: Tensor) -> None:
        """Makes NaN what the model left NaN or gave too little mass."""
        broken = ~fields["score"][usable].isfinite()
        light = ~broken & (fields["mass"][usable] < self.min_mass)
        for reason, count in zip(("model", "mass"), torch.stack([broken.sum(), light.sum()]).tolist(), strict=True):
            if count:
                failures[reason] += count
        for field in fields.values():
            field[usable] = field[usable].masked_fill(broken | light, torch.nan)

    def _prefill(self) -> Prefill:
        return Prefill(self._inner, self.images, self.max_tokens, self.counts)

    def _processed(self) -> Processed:
        return Processed(self._inner, self.images, self.prompt, self.max_tokens, self.counts)

    def _groups(self, rows: Rows) -> list[Group]:
        members: dict[Any, list[int]] = {}
        for row in rows.usable:
            shapes = tuple(image.shape[-2:] for image in (rows.references[rows.owner[row]], rows.edits[row]))
            members.setdefault((rows.owner[row], rows.instructions[row], shapes), []).append(row)
        groups = []
        for (owner, instructions, (original, edit)), own in members.items():
            sizes = [original] + [edit] * rows.turns
            question = self._question(instructions, tuple(self.images.tokens(*size) for size in sizes))
            group = new_group(self._inner, question, [self.images.grid(*size) for size in sizes], owner, own)
            if self.share_prefix and len(own) > 1:
                groups.append(group)
            else:
                groups += [group.alone(row) for row in own]
        return groups

    def _question(self, instructions: tuple[str, ...], tokens: tuple[int, ...]) -> Question:
        token = self.tokenizer.convert_ids_to_tokens(self._inner.config.image_token_id)
        question = split_question(self.tokenizer, self.prompt, instructions, tokens, image_token=token)
        if not self.prompt.thinking:
            return question
        ids, _ = encode(self.tokenizer, self.prompt, instructions, tokens, image_token=token, answers=[])
        return Question(question.prefix, ids[len(question.prefix) :], [])

    def _written(self, rows: Rows) -> JudgeScores:
        fields, failures = invalid_scores(rows)
        answers: list[list[str]] = [[] for _ in rows.edits]
        for row, ids in self._sampled(rows):
            answers[row] = [self.tokenizer.decode(own, skip_special_tokens=True) for own in ids]
        for row in rows.usable:
            read = [parse_answer(answer, rows.turns, self.prompt.answers) for answer in answers[row]]
            scores = torch.tensor([r for r in read if r is not None], dtype=torch.float64).view(-1, rows.turns)
            if len(scores) < len(read):
                failures["parse"] += len(read) - len(scores)
            mass = len(scores) / len(read)
            if not len(scores) or mass < self.min_mass:
                failures["mass"] += rows.turns if len(scores) else 0
                continue
            for name, value in sample_statistics(scores).items():
                fields[name][row] = value.to(fields[name])
            fields["mass"][row] = mass
        return finished(fields, failures, answers)

    def _sampled(self, rows: Rows) -> Any:
        """(row, token ids of its samples)."""
        options: dict[str, Any] = {
            "n": self.samples,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "stop": stops(self.prompt, rows.turns),
            "generator": torch.Generator(self._inner.device).manual_seed(self.seed),
        }
        if not rows.usable:
            return
        if isinstance(self.images, ImageSpec):
            for batch in self._prefill().answers(rows, self._groups(rows), keep=True, copies=self.samples):
                ids = continue_answers(
                    self._inner, self.tokenizer, batch.hidden[:, 0], batch.cache, batch.mask, batch.position,
                    rope_axes=3, **options,
                )  # fmt: skip
                yield from zip(batch.rows, ids, strict=True)
        else:
            for part, inputs in self._processed().questions(rows, [""], copies=self.samples):
                ids = sample_answers(self._inner, self.tokenizer, inputs, **options)
                yield from zip((row for row, _ in part), ids, strict=True)


def _check_head(model: Any) -> None:
    """`digit_score` takes logits for hidden states times the head's weight."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(f"model: expected a plain linear head, got {type(head).__name__}; merge its adapter first")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if (value := getattr(config, name, None)) not in (None, 1.0):
            raise ValueError(f"model: logits changed after the head are not supported, got {name}={value}")
