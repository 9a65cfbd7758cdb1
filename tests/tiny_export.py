"""Tiny random modules of every class that is exported."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    T5Config,
    T5EncoderModel,
)

from mtedit_fast.export.modules import (
    clip_text,
    dino,
    generator,
    klein_transformer,
    kontext_transformer,
    t5_text,
    vae_decoder,
    vae_encoder,
)
from mtedit_fast.export.ports import Port
from mtedit_fast.export.qwen import qwen_transformer

HEADS = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
BLOCKS = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
TYPES = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def flux():
    return FluxTransformer2DModel(
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )


def flux2():
    return Flux2Transformer2DModel(
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **HEADS,
    )


def qwen(**options):
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), **HEADS, **options
    )


def qwen_vae():
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        temperal_downsample=[True],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def clip():
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    )


def t5():
    return T5EncoderModel(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    )


def vit(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if kind == 2:
        return Dinov2Model(Dinov2Config(mlp_ratio=2, **sizes))
    return DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=32, num_register_tokens=2, **sizes))


class OneStep(nn.Module):
    """A diffusers UNet behind EDM's preconditioning (arXiv 2206.00364, table 1), σ_data = 0.5."""

    def __init__(self):
        super().__init__()
        self.net = UNet2DModel(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
            attention_head_dim=8,
        )

    def forward(self, x, log_sigma):
        sigma = log_sigma.exp()[:, None, None, None]
        total = sigma**2 + 0.25
        inner = self.net((x / total.sqrt()).to(x.dtype), log_sigma / 4, return_dict=False)[0]
        return (0.25 / total * x + 0.5 * sigma / total.sqrt() * inner).to(x.dtype)


def one_step(module):
    image, sigma = (
        Port(name, "float32", shape)
        for name, shape in (("x", ("batch", 3, "height", "width")), ("log_sigma", ("batch",)))
    )
    return generator(
        module,
        [image, sigma],
        [Port("restored", "float32", ("batch", 3, "height", "width"))],
        example={"batch": 2, "height": 8, "width": 12},
        sizes=lambda height, width, references: {"height": height, "width": width},
    )


def _exportables():
    text = {"text_tokens": 8}
    small_vae = AutoencoderKL(**BLOCKS, **TYPES, use_quant_conv=False, use_post_quant_conv=False)
    return {
        "kontext": lambda: kontext_transformer(flux(), **text),
        "klein": lambda: klein_transformer(flux2(), **text),
        "qwen": lambda: qwen_transformer(qwen(zero_cond_t=True), **text),
        "vae_encoder": lambda: vae_encoder(small_vae),
        "vae_decoder": lambda: vae_decoder(small_vae),
        "klein_vae_encoder": lambda: vae_encoder(AutoencoderKLFlux2(**BLOCKS, **TYPES)),
        "klein_vae_decoder": lambda: vae_decoder(AutoencoderKLFlux2(**BLOCKS, **TYPES)),
        "qwen_vae_encoder": lambda: vae_encoder(qwen_vae()),
        "qwen_vae_decoder": lambda: vae_decoder(qwen_vae()),
        "dinov2": lambda: dino(vit(2)),
        "dinov3": lambda: dino(vit(3)),
        "clip": lambda: clip_text(clip()),
        "t5": lambda: t5_text(t5(), **text),
        "one_step": lambda: one_step(OneStep()),
    }


def tiny_exportable(name, dtype=torch.float32):
    """An `Exportable` in eval mode, its weights random and none of them 0."""
    torch.manual_seed(0)
    exported = _exportables()[name]()
    for parameter in exported.module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    exported.module.eval()
    return exported


NAMES = tuple(_exportables())
