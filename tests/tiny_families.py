"""Tiny random pipelines of the Qwen-Image-Edit, FLUX.2-Klein and Klein-KV classes, built offline."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    "remove",
    "add",
    "the",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "to",
    "user",
    "assistant",
    "describe",
    "image",
    "instruction",
    "now",
    "please",
]
IDS = {word: i for i, word in enumerate(["<pad>", "<unk>", *SPECIAL, *WORDS])}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant"


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
        chat_template=TEMPLATE,
    )


class ImageProcessor(Qwen2VLProcessor):
    """Without the video half, which needs torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = IDS[self.image_token], IDS[self.video_token]
        ProcessorMixin.__init__(self, image_processor, tokenizer)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _finish(pipeline):
    """Output layers start at zero: give them something."""
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_klein(*, is_distilled: bool = True) -> Flux2KleinPipeline:
    return _attentive(_finish(Flux2KleinPipeline(*_klein_components(), is_distilled)))


def tiny_klein_kv(*, num_layers: int = 2, num_single_layers: int = 2) -> Flux2KleinKVPipeline:
    """Blocks after the first see what the references became."""
    return _attentive(_finish(Flux2KleinKVPipeline(*_klein_components(num_layers, num_single_layers))))


def _attentive(pipeline):
    """As drawn, attention is all but uniform and its gates all but closed: an output would hardly show its inputs."""
    for name, parameter in pipeline.transformer.named_parameters():
        parameter.data *= 3 if ".norm_" in name else 4 if "modulation" in name else 1
    pipeline.transformer.proj_out.weight.data *= 2
    return pipeline


def _klein_components(num_layers: int = 1, num_single_layers: int = 1):
    """Scheduler, VAE, text encoder, tokenizer, transformer."""
    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=len(IDS),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return _scheduler(), vae, Qwen3ForCausalLM(text), _tokenizer(), transformer


def tiny_qwen(kind: type = QwenImageEditPipeline, *, patch_size: int = 16, **options):
    """A QwenImageEditPipeline or its Plus; options of the transformer.

    patch_size: of the text encoder's vision tower. 16 leaves sides that are multiples of 32 as they are; 14, as in
    the checkpoints, resizes them once more.
    """
    torch.manual_seed(0)
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(IDS),
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": patch_size,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **{"num_layers": 2, **options},
    )
    encoder = Qwen2_5_VLForConditionalGeneration(text)
    for parameter in encoder.parameters():  # as they are drawn, attention is uniform and positions hardly count
        if parameter.ndim > 1:
            parameter.data *= 12
    images = Qwen2VLImageProcessorPil(patch_size=patch_size, min_pixels=28 * 28, max_pixels=112 * 112)
    pipeline = kind(
        scheduler=_scheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=_tokenizer(),
        processor=ImageProcessor(images, _tokenizer()),
        transformer=transformer,
    )
    pipeline.prompt_template_encode_start_idx = 5
    _finish(pipeline)
    for parameter in transformer.parameters():  # as above
        if parameter.ndim > 1:
            parameter.data *= 2
    return pipeline


def positioned(pipeline):
    """A QwenImageEditPipeline whose text encoder is told which tokens are images, as transformers 5 must be to place
    them; the stock pipelines leave it out."""

    def tell(encoder, args, kwargs):
        return args, kwargs | {"mm_token_type_ids": (kwargs["input_ids"] == encoder.config.image_token_id).int()}

    pipeline.text_encoder.register_forward_pre_hook(tell, with_kwargs=True)
    return pipeline
