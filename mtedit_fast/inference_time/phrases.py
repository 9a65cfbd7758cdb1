"""Nouns and their modifiers in prompts, and the text tokens that stand for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from mtedit_fast.editors import KleinEditor, KontextEditor, QwenEditor
from mtedit_fast.editors.qwen_text import chat_template

__all__ = ["LocatedPhrase", "Phrase", "PromptToken", "editor_tokens", "find_phrases", "locate", "prompt_tokens"]

Span = tuple[int, int]
"""First character and the one after the last."""
_MODIFIERS = {"amod", "nmod", "compound", "npadvmod", "advmod", "acomp"}
"""Dependencies of words that describe a noun, as in SynGen (arXiv 2306.08877)."""
_MARKER = "⟦prompt⟧"


@dataclass(frozen=True)
class Phrase:
    """An object of a prompt, and the words that describe it: each as it stands there, but for its case."""

    noun: str
    modifiers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Phrase:
        """From "NOUN:MODIFIER,MODIFIER", or "NOUN" alone. Raises ValueError where a word is missing."""
        noun, colon, rest = text.partition(":")
        modifiers = tuple(word.strip() for word in rest.split(",")) if colon else ()
        if not noun.strip() or not all(modifiers):
            raise ValueError(f'phrase: expected "NOUN:MODIFIER,MODIFIER" or "NOUN", got {text!r}')
        return cls(noun.strip(), modifiers)


class LocatedPhrase(NamedTuple):
    """Where in a prompt a phrase is."""

    noun: Span
    modifiers: tuple[Span, ...]


class PromptToken(NamedTuple):
    """A token of a model's text that holds characters of the prompt."""

    place: int  # among the text tokens the model attends to
    span: Span


def find_phrases(prompts: Sequence[str], model: str = "en_core_web_sm") -> list[list[Phrase]]:
    """The nouns of every prompt with their modifiers, by a dependency parser of spaCy.

    A noun without modifiers counts. Parsers are trained on sentences about the world: look at what one makes of terse
    instructions before trusting it.

    Raises:
        ImportError: spaCy or its `model` is not installed.
        ValueError: a prompt without nouns.
    """
    parser = _parser(model)
    found = [_of_parse(parser(prompt)) for prompt in prompts]
    for prompt, phrases in zip(prompts, found, strict=True):
        if not phrases:
            raise ValueError(
                f"prompts: expected a noun in every prompt, {model} finds none in {prompt!r}; name the object, or give "
                "phrases yourself"
            )
    return found


@lru_cache(maxsize=2)
def _parser(model: str) -> Any:
    try:
        import spacy

        return spacy.load(model)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"phrases: expected those of every prompt, or spaCy and its model {model} to find them (pip install spacy; "
            f'python -m spacy download {model}); give them as Phrase("circle", ("red",)), on the command line as '
            '--align "circle:red"'
        ) from error


def _of_parse(document: Any) -> list[Phrase]:
    """Phrases of a parsed text, modifiers in its order; "the car is red" counts as "red car"."""
    phrases = []
    for word in document:
        if word.pos_ not in ("NOUN", "PROPN") or word.dep_ in _MODIFIERS:
            continue
        described = [child for child in word.children if child.dep_ in (*_MODIFIERS, "relcl")]
        if word.dep_ == "nsubj" and word.head.pos_ == "AUX":
            described += [child for child in word.head.children if child.dep_ == "acomp"]
        modifiers = []
        while described:
            child = described.pop()
            if child.pos_ not in ("AUX", "VERB"):
                modifiers.append(child)
            described += [each for each in child.children if each.dep_ in (*_MODIFIERS, "conj")]
        phrases.append(Phrase(word.text, tuple(each.text for each in sorted(modifiers, key=lambda each: each.i))))
    return phrases


def locate(prompt: str, phrases: Sequence[Phrase]) -> list[LocatedPhrase]:
    """Where the words of each phrase are.

    Of a noun that comes several times, the place closest to its modifiers is taken, each place by one phrase.

    Raises:
        ValueError: no phrases, or a word that is not in the prompt as often as phrases name it.
    """
    if not phrases:
        raise ValueError(f"phrases: expected at least one noun of {prompt!r}, got none; name the object it is about")
    located: list[LocatedPhrase] = []
    for phrase in phrases:
        taken = {place.noun for place in located}
        nouns = [span for span in _places(prompt, phrase.noun) if span not in taken]
        if not nouns:
            times = "" if phrase.noun.lower() not in prompt.lower() else " as often as phrases name it"
            raise ValueError(
                f"phrases: expected nouns of the prompt, {phrase.noun!r} is not in {prompt!r}{times}; use its own words"
            )
        options = []
        for noun in nouns:
            chosen = []
            for modifier in phrase.modifiers:
                places = [span for span in _places(prompt, modifier) if span != noun]
                if not places:
                    raise ValueError(
                        f"phrases: expected modifiers of the prompt, {modifier!r} of {phrase.noun!r} is not in "
                        f"{prompt!r}; use its own words"
                    )
                chosen.append(min(places, key=partial(_gap, noun)))
            options.append((sum(_gap(span, noun) for span in chosen), LocatedPhrase(noun, tuple(chosen))))
        located.append(min(options, key=lambda option: option[0])[1])
    return located


def _places(prompt: str, words: str) -> list[Span]:
    pattern = r"\s+".join(map(re.escape, words.split()))
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", prompt, re.IGNORECASE)]


def _gap(first: Span, second: Span) -> int:
    """Characters between two words."""
    return max(first[0] - second[1], second[0] - first[1])


def prompt_tokens(
    tokenizer: Any, prompt: str, *, template: str = "{}", max_length: int | None = None
) -> list[PromptToken]:
    """The tokens that hold characters of `prompt`, numbered in the tokenized template around it.

    A fast tokenizer tells each token's characters; of others, the tokens of ever longer parts of the text are counted.

    Args:
        template: what is tokenized, "{}" being the prompt's place; other braces doubled, as for `str.format`.
        max_length: to which the text is padded and cut off; None: neither.

    Raises:
        ValueError: the text is cut off within the prompt.
    """
    prompt_start = template.format(_MARKER).index(_MARKER)
    text, end = template.format(prompt), prompt_start + len(prompt)
    options: dict[str, Any] = {}
    if max_length is not None:
        options = {"padding": "max_length", "truncation": True, "max_length": max_length}
    if getattr(tokenizer, "is_fast", False):
        spans = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    else:
        spans = _counted_spans(tokenizer, text, options)
    inside = [(max(start, prompt_start) - prompt_start, min(stop, end) - prompt_start) for start, stop in spans]
    tokens = [
        PromptToken(place, (start, stop))
        for place, (start, stop) in enumerate(inside)
        if start < stop and prompt[start:stop].strip()
    ]
    reached = max((token.span[1] for token in tokens), default=0)
    if prompt[reached:].strip():
        raise ValueError(
            f"prompts: expected at most {max_length} tokens, {prompt!r} is cut off after {prompt[:reached]!r}; shorten "
            "it, or raise max_sequence_length"
        )
    return tokens


def _counted_spans(tokenizer: Any, text: str, options: dict[str, Any]) -> list[Span]:
    """Characters of each token, to the word; (0, 0) of those around the text."""
    pieces = tokenizer.tokenize(text)
    spans: list[Span] = []
    start = 0
    for end in sorted({edge for match in re.finditer(r"\w+|[^\w\s]", text) for edge in match.span()}):
        known = tokenizer.tokenize(text[:end])
        if known == pieces[: len(known)]:  # else what ends here and what follows are tokenized together
            spans += [(start, end)] * (len(known) - len(spans))
            start = end
    ids, bare = tokenizer(text, **options)["input_ids"], tokenizer.convert_tokens_to_ids(pieces)
    before = next((first for first, value in enumerate(ids) if value == bare[0] and _starts(ids[first:], bare)), 0)
    around: list[Span] = [(0, 0)] * len(ids)
    kept = spans[: len(ids) - before]
    around[before : before + len(kept)] = kept
    return around


def _starts(ids: list[int], bare: list[int]) -> bool:
    """Whether `ids` begin with `bare`, or with as much of it as a cut left."""
    shared = next((i for i, (a, b) in enumerate(zip(ids, bare, strict=False)) if a != b), min(len(ids), len(bare)))
    return shared == len(bare) or shared >= len(ids) - 1


def editor_tokens(editor: Any, prompts: Sequence[str], images: Tensor | None = None) -> list[list[PromptToken]]:
    """Where the words of instructions are among the text tokens of an editor's transformer.

    Args:
        images: [P, 3, H, W] or [P, R, 3, H, W] that the text encoder reads with the prompts, for one whose
            `text_sees_image`.

    Raises:
        TypeError: an editor of no family known here.
        ValueError: a prompt longer than the editor takes.
    """
    longest = getattr(editor, "max_sequence_length", None)
    if isinstance(editor, KontextEditor):
        tokenizer = editor.pipeline.tokenizer_2
        return [prompt_tokens(tokenizer, prompt, max_length=longest) for prompt in prompts]
    if isinstance(editor, KleinEditor):
        tokenizer = editor.pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARKER}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        template = text.replace("{", "{{").replace("}", "}}").replace(_MARKER, "{}")
        return [prompt_tokens(tokenizer, prompt, template=template, max_length=longest) for prompt in prompts]
    if isinstance(editor, QwenEditor):
        count, pads = 0, 0
        if images is not None:
            count = images.shape[1] if images.ndim == 5 else 1
            pads = editor.text_image_tokens(*images.shape[-2:]) - 1  # an image is one token before it is expanded
        shift = count * pads - editor.pipeline.prompt_template_encode_start_idx
        tokenizer, template = editor.pipeline.processor.tokenizer, chat_template(editor.pipeline, count)
        found = [prompt_tokens(tokenizer, prompt, template=template) for prompt in prompts]
        return [[PromptToken(token.place + shift, token.span) for token in tokens] for tokens in found]
    raise TypeError(f"editor: expected one of Kontext, Klein or Qwen, got {type(editor).__name__}")
