"""The judge as public reward code calls it: image by image through PIL, one `generate` call for every score."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from mtedit_fast.judge import ImageSpec, JudgePrompt
from mtedit_fast.judge.sequence import encode, score_token_ids


def to_pil(image: Tensor) -> Image.Image:
    """Of [3, H, W] in [0, 1]."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


class JudgeLoop:
    """Expected scores of the turns of one trajectory.

    Args:
        model, tokenizer: of a Qwen-VL.
        spec: what the model was trained to see of an image; the stock processor does it.
    """

    def __init__(self, model: Any, tokenizer: Any, spec: ImageSpec, prompt: JudgePrompt):
        self.model, self.tokenizer, self.spec, self.prompt = model, tokenizer, spec, prompt
        self.token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        self.values = torch.tensor(prompt.answers.values)
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=spec.patch_size,
            temporal_patch_size=spec.temporal_patch_size,
            merge_size=spec.merge_size,
            image_mean=list(spec.mean),
            image_std=list(spec.std),
            size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        )

    def score(self, pictures: Sequence[Image.Image], instructions: Sequence[str], opening: str) -> float:
        """One score: the question with the turn's opening, and a token. pictures: the original and K edits."""
        model, device = self.model, self.model.device
        images = self.processor(images=list(pictures), return_tensors="pt")
        tokens = [self.spec.tokens(picture.height, picture.width) for picture in pictures]
        question, (answer,) = encode(
            self.tokenizer, self.prompt, instructions, tokens, image_token=self.token, answers=[opening]
        )
        ids = torch.tensor([question + answer], device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=images["pixel_values"].to(device, model.dtype),
            image_grid_thw=images["image_grid_thw"].to(device),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        digits = out.logits[0][0, list(score_token_ids(self.tokenizer, self.prompt.answers, opening))]
        return (digits.float().softmax(0).cpu() @ self.values).item()

    def __call__(self, pictures: Sequence[Image.Image], instructions: Sequence[str]) -> list[float]:
        """[K]."""
        openings = self.prompt.openings(len(instructions))
        return [self.score(pictures, instructions, opening) for opening in openings]
