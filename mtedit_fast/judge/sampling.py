"""Sampled answers of a vision-language model: many questions at once, each prefilled once whatever the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.attention import without_cudnn_attention

from .prompts import JudgePrompt

__all__ = ["continue_answers", "sample_answers", "stops"]

WINDOW = 32  # last tokens that are searched for the text an answer ends with


def stops(prompt: JudgePrompt, turns: int) -> list[str]:
    """What a complete answer holds, in this order: the end of the thought, the end of the last score."""
    last = prompt.openings(turns)[-1].replace("<", "</")
    return ["</Thought>", last] if prompt.thinking else [last]


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> list[list[list[int]]]:
    """Answers [b][i], token ids of sample i of n to question b, with the token that ended it where one did.

    A question goes through the model once, and its keys and values are repeated for its samples; answers that have
    ended leave the batch. The noise of a step is one draw of [B · n, vocabulary] from `generator`: the same state and
    the same questions give the same answers.

    Args:
        model: a ForConditionalGeneration of transformers, in eval mode; with LoRA or without.
        inputs: keyword arguments of model.model's forward. input_ids [B, L] and, where questions are padded, on
            either side, attention_mask [B, L]; images as the model takes them. position_ids [B, L] or [3, B, L] are
            worked out where they are not given.
        temperature: 0 takes the likeliest token. top_p: keep the likeliest tokens that make up this much probability.
        stop: an answer ends once it holds these texts, in this order, or at one of the model's end tokens, or after
            max_new_tokens.
        generator: on any device; None draws from torch's default one.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = inputs.get("position_ids")
    if positions is None and hasattr(model.model, "get_rope_index"):
        types = inputs.get("mm_token_type_ids")
        types = (ids == model.config.image_token_id).int() if types is None else types
        grid = inputs.get("image_grid_thw")
        positions, _ = model.model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)
    elif positions is None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    out = model.model(**{**inputs, "attention_mask": mask, "position_ids": positions}, use_cache=True)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    filled = positions.masked_fill(~mask, 0)
    return continue_answers(
        model,
        tokenizer,
        out.last_hidden_state[torch.arange(len(ids), device=ids.device), last],
        out.past_key_values,
        mask,
        filled.amax(-1).view(-1, len(ids)).amax(0) + 1,
        rope_axes=3 if positions.ndim == 3 else 0,
        n=n,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        stop=stop,
        generator=generator,
    )


@torch.no_grad()
@without_cudnn_attention()
def continue_answers(
    model: Any,
    tokenizer: Any,
    hidden: Tensor,
    cache: Any,
    mask: Tensor,
    position: Tensor,
    *,
    rope_axes: int,
    n: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    stop: Sequence[str],
    generator: torch.Generator | None,
) -> list[list[list[int]]]:
    """`sample_answers` after the prefill.

    hidden: [B, H] at the questions' last tokens. cache: their keys and values, used up. mask: [B, L] bool, which of
    these are tokens. position: [B] of the next token. rope_axes: of its position ids, 0 for models with a single one.
    """
    if n < 1 or max_new_tokens < 1:
        raise ValueError(f"n and max_new_tokens must be >= 1, got {n} and {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    device, rows = hidden.device, len(hidden) * n
    past = mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], 1)
    head = model.get_output_embeddings()
    ends = _end_tokens(model, tokenizer)
    answers = [_Answer(tokenizer, stop, ends) for _ in range(rows)]
    writers, alive = answers, torch.arange(rows, device=device)  # the answers that the batch writes, and their numbers
    logits = head(hidden).float().repeat_interleave(n, 0)
    for step in range(max_new_tokens):
        tokens = _draw(logits, alive, rows, temperature, top_p, generator)
        for answer, token in zip(writers, tokens.tolist(), strict=True):
            answer.append(token)
        unfinished = [i for i, answer in enumerate(writers) if not answer.ended]
        if not unfinished or step + 1 == max_new_tokens:
            break
        first = step == 0 and n > 1
        if first or 2 * len(unfinished) <= len(alive):  # else copying the cache is not worth it
            kept = torch.tensor(unfinished, device=device)
            source = alive[kept] // n if step == 0 else kept
            cache.batch_select_indices(source)
            writers = [writers[i] for i in unfinished]
            alive, tokens, position, mask = alive[kept], tokens[kept], position[source], mask[source]
        at = position[:, None]
        out = model.model(
            input_ids=tokens[:, None],
            attention_mask=mask[:, : past + step + 1],
            position_ids=at.expand(rope_axes, *at.shape) if rope_axes else at,
            past_key_values=cache,
            use_cache=True,
        )
        cache, position = out.past_key_values, position + 1
        logits = head(out.last_hidden_state[:, -1]).float()
    return [[answer.ids for answer in answers[i : i + n]] for i in range(0, rows, n)]


class _Answer:
    """Token ids so far, and whether they make a complete answer."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], end_tokens: set[int]) -> None:
        self.tokenizer, self.stop, self.end_tokens = tokenizer, list(stop), end_tokens
        self.ids: list[int] = []
        self.ended = False
        self._since = 0  # the token that completed the last text found

    def append(self, token: int) -> None:
        if self.ended:
            return
        self.ids.append(token)
        self.ended = token in self.end_tokens
        if self.stop and not self.ended:
            text = self.tokenizer.decode(self.ids[max(self._since, len(self.ids) - WINDOW) :])
            if self.stop[0] in text:
                self.stop.pop(0)
                self._since = len(self.ids) - 1
                self.ended = not self.stop


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def _draw(
    logits: Tensor, alive: Tensor, rows: int, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """[batch] tokens from logits [batch, V] of the answers `alive` among `rows`."""
    if temperature == 0:
        return logits.argmax(1)
    probs = (logits / temperature).softmax(1)
    if top_p < 1:
        ordered = probs.sort(1, descending=True).values
        before = ordered.cumsum(1) - ordered  # of the likelier tokens; the likeliest always stays
        least = ordered.masked_fill(before >= top_p, 2.0).amin(1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
    device = logits.device if generator is None else generator.device
    noise = torch.empty(rows, probs.shape[1], device=device).exponential_(generator=generator).to(logits.device)
    # With E exponential, P(argmax p/E = i) is p_i. Noise is drawn for answers that have ended too, so that an answer
    # does not depend on when others end.
    return (probs / noise[alive].clamp_(min=torch.finfo(torch.float32).tiny)).argmax(1)
