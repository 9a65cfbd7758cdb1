"""The playground's models, all of stock classes: a FluxKontextPipeline and a Dinov2Model, tiny."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from .instructions import VOCABULARY
from .world import SIZE

WEIGHTS = Path(__file__).resolve().parent / "weights"
MAX_TOKENS = 16
GUIDANCE = 2.5
SHIFT = 3.0  # of the flow-matching schedule: sigma' = shift·sigma / (1 + (shift - 1)·sigma)
TEXT_DIM = 96


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, </s> appended; both text encoders use it."""
    words = ["<pad>", "</s>", "<unk>", *VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_pipeline(vae: AutoencoderKL) -> FluxKontextPipeline:
    """A FluxKontextPipeline with random weights around a given VAE; 2×2 packing makes one token one cell."""
    vocabulary = len(VOCABULARY) + 3
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            projection_dim=TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    )
    # Flux gives every text token the same position, so the order of words must come from T5's relative bias
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=TEXT_DIM // 4,
            d_ff=2 * TEXT_DIM,
            num_layers=2,
            num_heads=4,
            relative_attention_max_distance=MAX_TOKENS,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=math.log(SHIFT), max_shift=math.log(SHIFT)
    )
    return FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=new_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=new_tokenizer(),
        transformer=transformer,
    )


def new_dino() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=SIZE, patch_size=8
        )
    )


def _folder(path: str | Path | None, name: str) -> Path:
    folder = WEIGHTS / name if path is None else Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no playground weights at {folder}: make them with `mtedit-fast playground build`, or pass the folder"
        )
    return folder


def load_pipeline(path: str | Path | None = None, dtype: torch.dtype = torch.float32) -> FluxKontextPipeline:
    """The playground's editor, in eval mode.

    path: folder in `save_pretrained` layout; None takes the committed weights. Raises FileNotFoundError when missing.
    """
    pipeline = FluxKontextPipeline.from_pretrained(str(_folder(path, "pipeline")), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_dino(path: str | Path | None = None) -> Dinov2Model:
    """The playground's Dinov2Model (patch 8, hidden 64) in fp32 and eval mode.

    path: folder in `save_pretrained` layout; None takes the committed weights. Raises FileNotFoundError when missing.
    """
    return Dinov2Model.from_pretrained(str(_folder(path, "dino")), dtype=torch.float32).eval()
