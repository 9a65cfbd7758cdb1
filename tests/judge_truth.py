"""A judge's scores one at a time: the plain model fed the question and the beginning of one answer, in one sequence."""

import copy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from mtedit_fast.judge import ImageSpec, prepare_images
from mtedit_fast.judge.prompts import JudgePrompt
from mtedit_fast.training.playground.judge_model import IMAGES, SPECIAL, new_judge_model, new_judge_tokenizer

TOKENIZER = new_judge_tokenizer()
ANY_SIZE = replace(IMAGES, min_pixels=32**2, max_pixels=96**2)
TEXTS = (
    "Add a red circle left of the blue square",
    "Remove the yellow triangle above the text X 3, then Change the background to sunset",
    "Change the color",
    "Replace the text of the sign with A 2 L",
)


def spread(model, scale: float = 4.0):
    """Random weights so large that scores tell questions and images apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    return model.eval()


def qwen3(tied: bool = True):
    model = new_judge_model(seed=0, tokenizer=TOKENIZER)
    if not tied:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = type(model)(config)
    return spread(model)


def qwen2(family: str, scale: float = 4.0):
    """A tiny Qwen2-VL, or a Qwen2.5-VL with window attention in all vision layers but one."""
    ids = dict(zip(SPECIAL, TOKENIZER.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    text = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": TOKENIZER.pad_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
    }
    vision = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "qwen2_vl":
            vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))
        else:
            vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
            vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
            config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
            model = Qwen2_5_VLForConditionalGeneration(config)
    return spread(model, scale)


def group_inputs(groups: int, members: int, turns: int, seed: int = 0):
    """references [R, 3, 64, 64], edits [R · members, turns, 3, 64, 64], instructions and owners of the edits."""
    generator = torch.Generator().manual_seed(seed)
    references = torch.rand(groups, 3, 64, 64, generator=generator)
    edits = torch.rand(groups * members, turns, 3, 64, 64, generator=generator)
    owner = [row // members for row in range(len(edits))]
    return references, edits, [[TEXTS[(i + k) % len(TEXTS)] for k in range(turns)] for i in owner], owner


@torch.no_grad()
def plain_logits(
    model, prompt: JudgePrompt, spec: ImageSpec, reference: Tensor, edits: Tensor, instructions: list[str]
) -> Tensor:
    """[K, V] logits of the score of every turn: the stock forward of the whole sequence, one turn at a time."""
    patches, grid = prepare_images([reference, *edits], spec, dtype=model.dtype)
    text = TOKENIZER.apply_chat_template(prompt.messages(instructions), tokenize=False, add_generation_prompt=True)
    pieces = text.split("<|image_pad|>")
    for count, piece in zip((grid.prod(1) // spec.merge_size**2).tolist(), pieces[1:], strict=True):
        pieces[0] += "<|image_pad|>" * count + piece
    names = ["Score"] if len(edits) == 1 else [f"Turn{turn}Score" for turn in range(1, len(edits) + 1)]
    rows = []
    for name in names:
        ids = TOKENIZER(pieces[0] + f"<{name}>", return_tensors="pt", add_special_tokens=False).input_ids
        types = (ids == model.config.image_token_id).int()
        out = model(input_ids=ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=types)
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def plain_scores(model, prompt: JudgePrompt, spec: ImageSpec, references, edits, instructions, owner) -> Tensor:
    """[B, K] expected values within the set of score tokens."""
    ids = TOKENIZER.convert_tokens_to_ids(list(prompt.answers.texts))
    values = torch.tensor(prompt.answers.values)
    rows = [
        plain_logits(model, prompt, spec, references[i], edits[row], instructions[row])[:, ids].softmax(1) @ values
        for row, i in enumerate(owner)
    ]
    return torch.stack(rows)
