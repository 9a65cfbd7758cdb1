"""The playground's judge: a tiny Qwen3-VL with a word-level tokenizer; one visual token is one cell of the world."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mtedit_fast.judge import HuggingFaceJudge
from mtedit_fast.judge.prompts import JudgePrompt
from mtedit_fast.qwen_vl import ImageSpec

from .instructions import VOCABULARY
from .models import _folder
from .world import CELL, CELLS, SIZE

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("Thought", "Score", *(f"Turn{turn}Score" for turn in range(1, 10)))
WORDS = """
system user assistant Original Edited image Instruction Instructions After turn Score each edit
wanted done partly missing rest kept changed yes no . : , /
"""
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

PLAYGROUND_PROMPT = JudgePrompt("1-5", rubric="Score each edit.")
"""A tiny model is taught its scale by examples, not by a rubric it cannot read."""

IMAGES = ImageSpec(
    patch_size=CELL // 2,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=SIZE**2,
    max_pixels=SIZE**2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def new_judge_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, digit, punctuation mark and tag; ChatML with images, like Qwen's."""
    words = ["<pad>", "<unk>", *dict.fromkeys((*"0123456789", *VOCABULARY, *WORDS.split()))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def new_judge_model(seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None) -> Qwen3VLForConditionalGeneration:
    """A Qwen3VLForConditionalGeneration of 1.6 M parameters with random weights, fp32, in eval mode."""
    tokenizer = tokenizer or new_judge_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    hidden = 128
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": IMAGES.patch_size,
            "temporal_patch_size": IMAGES.temporal_patch_size,
            "spatial_merge_size": IMAGES.merge_size,
            "out_hidden_size": hidden,
            "num_position_embeddings": 4 * CELLS,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config).eval()


def load_judge_parts(
    path: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Qwen3VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """The playground's judge and its tokenizer, from a `save_pretrained` folder; None takes the committed weights."""
    folder = _folder(path, "judge")
    model = Qwen3VLForConditionalGeneration.from_pretrained(str(folder), dtype=dtype).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(str(folder))


def load_judge(path: str | Path | None = None, *, device: torch.device | str = "cpu") -> HuggingFaceJudge:
    """The playground's judge in fp32, asked for expected scores from 1 to 5; None takes the committed weights."""
    model, tokenizer = load_judge_parts(path)
    return HuggingFaceJudge(model.to(device), tokenizer, IMAGES, PLAYGROUND_PROMPT)
