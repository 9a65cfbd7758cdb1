"""Tiny stock pipelines of every family, with embeddings in place of their text encoders."""

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image

STEPS = 4
BATCH = 2


def stock_scheduler():
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def kontext():
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.0,
    )
    modules = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxKontextPipeline(scheduler=stock_scheduler(), vae=vae, transformer=transformer, **modules)
    embeds = {"prompt_embeds": torch.randn(BATCH, 5, 16), "pooled_prompt_embeds": torch.randn(BATCH, 16)}
    extra = {"height": 24, "width": 24, "max_area": 24 * 24, "_auto_resize": False}
    return pipe, embeds, extra


def qwen_edit():
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    modules = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
    pipe = QwenImageEditPipeline(scheduler=stock_scheduler(), vae=vae, transformer=transformer, **modules)
    embeds = {"prompt_embeds": torch.randn(BATCH, 5, 16), "negative_prompt_embeds": torch.randn(BATCH, 5, 16)}
    extra = {"true_cfg_scale": 3.0, "height": 32, "width": 32}
    extra |= {f"{name}_mask": torch.ones(BATCH, 5, dtype=torch.int64) for name in embeds}
    return pipe, embeds, extra


def klein():
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=2,
    )
    modules = dict.fromkeys(("text_encoder", "tokenizer"))
    pipe = Flux2KleinPipeline(
        scheduler=stock_scheduler(), vae=vae, transformer=transformer, is_distilled=True, **modules
    )
    return pipe, {"prompt_embeds": torch.randn(BATCH, 5, 16)}, {"height": 24, "width": 24}


PIPELINES = [kontext, qwen_edit, klein]


class Editor:
    """A tiny stock pipeline in one dtype, whose velocities are kept as the scheduler saw them."""

    def __init__(self, build, dtype):
        torch.manual_seed(0)
        self.pipe, embeds, self.extra = build()
        self.pipe.to(dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.embeds = {name: value.to(dtype) for name, value in embeds.items()}
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        self.image = Image.fromarray(pixels)
        self.velocities = []

    def use(self, scheduler):
        step = scheduler.step

        def keep(model_output, *args, **kwargs):
            self.velocities.append(model_output)
            return step(model_output, *args, **kwargs)

        scheduler.step = keep
        self.pipe.scheduler = scheduler
        return scheduler

    def __call__(self):
        """Runs the pipeline; the packed latents after its last step."""
        self.velocities.clear()
        after = []
        self.pipe(
            image=self.image,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, tensors: after.append(tensors["latents"]) or {},
            **self.embeds,
            **self.extra,
        )
        return after[-1]
