"""Editors of public sizes with random weights, made where they run, and tiny ones of the same classes.

No checkpoint, and no copy through host memory. Text encoders are left out: a prompt's conditioning is random, of the
shape the family has, and how often it was asked for is counted. The VAE is real.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, QwenImageEditPlusPipeline
from torch import Tensor, nn

from mtedit_fast.editors import KleinEditor, KontextEditor, QwenEditor, TextConditioning
from mtedit_fast.editors.klein_kv import KleinKVEditor
from mtedit_fast.editors.pipeline_editor import NEGATIVE
from mtedit_fast.training.dtypes import default_dtype
from mtedit_fast.training.public_models import FAMILIES, PUBLIC, PublicModel

IMAGE_TOKENS = 196  # of a 384² image in Qwen2.5-VL: 27 patches of 14 pixels a side, rounded to 28 and merged 2 × 2
NO_PROMPT_TOKENS = 8  # of the template around an empty negative prompt


class RandomText:
    """An editor without text encoder: rows that depend on the prompt alone, the same on every call.

    Attributes:
        text_calls, text_prompts: calls of `encode_text`, and prompts in them.
    """

    device: torch.device
    dtype: torch.dtype
    config: Any
    max_sequence_length: int
    negative_prompt: str | None
    family: str
    text_calls = text_prompts = 0

    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> TextConditioning:
        """As the editor's own, without looking at the images."""
        self.text_calls += 1
        self.text_prompts += len(prompts)
        text = self._rows("", prompts)
        if self.negative_prompt is not None:
            text |= self._rows(NEGATIVE, [self.negative_prompt] * len(prompts))
        return text

    def _rows(self, prefix: str, prompts: list[str]) -> TextConditioning:
        shapes = FAMILIES[self.family].text(self.max_sequence_length, self.config)
        text = {
            prefix + name: torch.stack([self._row(name + prompt, shape) for prompt in prompts])
            for name, shape in shapes.items()
            if name != "mask"
        }
        if "mask" in shapes:
            place = torch.arange(self.max_sequence_length, device=self.device)
            mask = (place < self._length(prefix)).expand(len(prompts), -1)
            text |= {prefix + "mask": mask, prefix + "embeds": text[prefix + "embeds"] * mask[..., None]}
        return text

    def _row(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=self.dtype)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

    def _length(self, prefix: str) -> int:
        """Tokens that count: half of the room for an instruction, and its image's."""
        room = self.max_sequence_length - IMAGE_TOKENS
        if room <= 0:  # tiny
            return self.max_sequence_length // (4 if prefix else 2)
        return IMAGE_TOKENS + (NO_PROMPT_TOKENS if prefix else room // 8)


class RandomKontext(RandomText, KontextEditor):
    family = "kontext"


class RandomQwen(RandomText, QwenEditor):
    family = "qwen_image_edit"


class RandomKlein(RandomText, KleinEditor):
    family = "flux2_klein"


class RandomKleinKV(RandomText, KleinKVEditor):
    family = "flux2_klein"


@dataclass(frozen=True)
class Recipe:
    """One editor, and how it is sampled in training (Kontext and Qwen: Flow-GRPO's configurations)."""

    editor: Any
    full: PublicModel
    tiny: PublicModel
    steps: int
    eta: float
    guidance_scale: float = 1.0
    pipeline: Any = None  # None: the family's
    text_tokens: int = 512  # a prompt is padded to
    tiny_side: int = 32  # pixels

    def options(self) -> dict[str, Any]:
        return {"negative_prompt": " "} if self.guidance_scale > 1 and self.editor is RandomQwen else {}


_TINY_KONTEXT = PublicModel(
    {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    },
    {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
        "mid_block_add_attention": False,
    },
    0,
)
_TINY_QWEN = PublicModel(
    {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    },
    {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.7, 1.0, 2.0],
    },
    0,
)
_TINY_KLEIN = PublicModel(
    {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    },
    {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    0,
    is_distilled=True,
)
_TINY_2511 = PublicModel(_TINY_QWEN.transformer | {"zero_cond_t": True}, _TINY_QWEN.vae, 0)
_QWEN: dict[str, Any] = {
    "steps": 10,
    "eta": 1.0,
    "guidance_scale": 4.0,
    "pipeline": QwenImageEditPlusPipeline,
    "text_tokens": 512 + IMAGE_TOKENS,
    "tiny_side": 64,
}

RECIPES = {
    "kontext": Recipe(
        RandomKontext, PUBLIC["black-forest-labs/FLUX.1-Kontext-dev"], _TINY_KONTEXT, 6, 0.9, guidance_scale=2.5
    ),
    "qwen-2511": Recipe(RandomQwen, PUBLIC["Qwen/Qwen-Image-Edit-2511"], _TINY_2511, **_QWEN),
    "qwen-2509": Recipe(RandomQwen, PUBLIC["Qwen/Qwen-Image-Edit-2509"], _TINY_QWEN, **_QWEN),
    "klein-4b": Recipe(RandomKlein, PUBLIC["black-forest-labs/FLUX.2-klein-4B"], _TINY_KLEIN, 4, 0.7),
    "klein-9b": Recipe(RandomKlein, PUBLIC["black-forest-labs/FLUX.2-klein-9B"], _TINY_KLEIN, 4, 0.7),
    "klein-kv-9b": Recipe(
        RandomKleinKV, PUBLIC["black-forest-labs/FLUX.2-klein-9B"], _TINY_KLEIN, 4, 0.7, pipeline=Flux2KleinKVPipeline
    ),
}
ALIASES = {"qwen": "qwen-2511", "klein": "klein-4b", "klein-kv": "klein-kv-9b"}
TINY_TEXT_TOKENS = 16


def random_editor(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Any:
    """The editor `name` of `RECIPES` with random weights of `dtype`, made on `device` ("meta" included).

    Equal arguments give equal weights. Parameters that start at zero get something, so that no output is zero.
    """
    recipe = RECIPES[name]
    family, model = FAMILIES[recipe.editor.family], recipe.tiny if tiny else recipe.full
    torch.manual_seed(0)
    with device, default_dtype(dtype):
        transformer, vae = family.transformer.from_config(model.transformer), family.vae.from_config(model.vae)
    for module in (transformer, vae):
        _wake(module.eval().requires_grad_(False))
    components = {"scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "vae": vae}
    components |= dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "processor"))
    kind = recipe.pipeline or family.pipeline
    known = kind.__init__.__annotations__ | {"is_distilled": bool}
    arguments = {key: value for key, value in components.items() if key in known} | {"transformer": transformer}
    if kind is FAMILIES["flux2_klein"].pipeline:
        arguments["is_distilled"] = model.is_distilled
    tokens = TINY_TEXT_TOKENS if tiny else recipe.text_tokens
    return recipe.editor(kind(**arguments), max_sequence_length=tokens, **recipe.options())


def _wake(module: nn.Module) -> None:
    for parameter in module.parameters():
        if not parameter.is_meta and not parameter.any():
            parameter.normal_(std=0.02)
