"""What is exported of each model, and under which names: the calls that editors, judges and generators make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .ports import Bucket, Port, Profile, Range, dtype_name


@dataclass(frozen=True)
class LoraShape:
    """The adapter that a graph takes as inputs: its rank, to which smaller ones are padded, and the adapted layers."""

    rank: int
    layers: tuple[str, ...]


Call = Callable[..., Tensor | tuple[Tensor, ...]]
Sizes = Callable[[int, int, int], Mapping[str, int | Range]]


@dataclass
class Exportable:
    """A module with named tensors in and out.

    module: owner of the weights, in eval mode and in the dtype to export.
    call: takes the inputs by name, returns the outputs in order.
    inputs: outputs: see `Port`; every dynamic dimension of an output may have a name of its own.
    sizes: (height, width, references) of an edit -> the size, or the range of sizes, of every dynamic dimension of the
        inputs but "batch".
    example: sizes to trace with, all ≥ 2 and different: a size of 0 or 1 would become fixed.
    plain: the module's own forward returns its one output itself, not in a tuple.
    fused_attention: attention has head sizes that TensorRT has kernels for in half precision, so that it may stay one
        node of the graph; of others the builder refuses such nodes.
    lora: what `lora.lora_inputs` has added.
    """

    module: nn.Module
    call: Call
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sizes: Sizes = lambda height, width, references: {}
    example: Mapping[str, int] = field(default_factory=dict)
    plain: bool = False
    fused_attention: bool = False
    lora: LoraShape | None = None

    @property
    def opset(self) -> int:
        """20 in fp32; in half precision 22, whose convolutions take bf16, or 23, where attention is one node."""
        return 20 if self.dtype == "float32" else 23 if self.fused_attention else 22

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return float_dtype(self.module)

    def profile(self, bucket: Bucket) -> Profile:
        """The sizes of every dynamic dimension in a bucket."""
        batch, heights, widths = (bucket.ranged(name) for name in ("batch", "height", "width"))
        found = [self.sizes(*size, bucket.references) for size in zip(heights, widths, strict=True)]
        ranges: dict[str, Range] = {"batch": batch}
        for name in found[0]:
            values = [size[name] for size in found]
            low, best, high = (v if isinstance(v, int) else v[i] for i, v in enumerate(values))
            ranges[name] = (low, best, high)
        names = {size for port in self.inputs for size in port.shape if isinstance(size, str)}
        return Profile(str(bucket), {name: value for name, value in ranges.items() if name in names})


def float_dtype(module: nn.Module) -> str:
    """Name of the dtype of a module's weights."""
    return dtype_name(next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()))


def kontext_transformer(model: Any, *, text_tokens: int = 512, multiple: int = 16) -> Exportable:
    """`FluxTransformer2DModel` as `KontextEditor` calls it.

    text_tokens: of one prompt, in profiles. multiple: pixels per token side, VAE factor × 2.
    """
    config, dtype = model.config, float_dtype(model)
    inputs = [
        Port("hidden_states", dtype, ("batch", "sequence", config.in_channels)),
        Port("encoder_hidden_states", dtype, ("batch", "text", config.joint_attention_dim)),
        Port("pooled_projections", dtype, ("batch", config.pooled_projection_dim)),
        Port("timestep", dtype, ("batch",)),
        Port("img_ids", "float32", ("sequence", 3)),
        Port("txt_ids", "float32", ("text", 3)),
    ]
    if config.guidance_embeds:
        inputs.append(Port("guidance", "float32", ("batch",)))
    return Exportable(
        module=model,
        call=lambda **tensors: model(**tensors, return_dict=False)[0],
        inputs=tuple(inputs),
        outputs=(Port("velocity", dtype, ("batch", "sequence", config.out_channels or config.in_channels)),),
        sizes=_sequence_sizes(text_tokens, multiple),
        example={"batch": 2, "sequence": 24, "text": 7},
        fused_attention=True,
    )


def klein_transformer(model: Any, *, text_tokens: int = 512, multiple: int = 16) -> Exportable:
    """`Flux2Transformer2DModel` as `KleinEditor` calls it."""
    config, dtype = model.config, float_dtype(model)
    inputs = [
        Port("hidden_states", dtype, ("batch", "sequence", config.in_channels)),
        Port("encoder_hidden_states", dtype, ("batch", "text", config.joint_attention_dim)),
        Port("timestep", dtype, ("batch",)),
        Port("img_ids", "float32", ("sequence", 4)),
        Port("txt_ids", "float32", ("text", 4)),
    ]
    if config.guidance_embeds:
        inputs.append(Port("guidance", "float32", ("batch",)))
    guidance = {} if config.guidance_embeds else {"guidance": None}
    return Exportable(
        module=model,
        call=lambda **tensors: model(**tensors, **guidance, return_dict=False)[0],
        inputs=tuple(inputs),
        outputs=(Port("velocity", dtype, ("batch", "sequence", config.out_channels or config.in_channels)),),
        sizes=_sequence_sizes(text_tokens, multiple),
        example={"batch": 2, "sequence": 24, "text": 7},
        fused_attention=True,
    )


def _sequence_sizes(text_tokens: int, multiple: int) -> Sizes:
    def sizes(height: int, width: int, references: int) -> dict[str, int | Range]:
        for name, side in (("height", height), ("width", width)):
            if side % multiple:
                raise ValueError(f"{name}: expected a multiple of {multiple} (VAE factor × 2×2 packing), got {side}")
        return {"sequence": (1 + references) * (height // multiple) * (width // multiple), "text": text_tokens}

    return sizes


def vae_encoder(vae: Any) -> Exportable:
    """Images in [−1, 1] to the mode of the latents' distribution, unnormalised; Qwen's VAE with its frame dimension."""
    dtype, factor, frames = float_dtype(vae), vae_factor(vae), _frames(vae)
    channels = vae.config.get("latent_channels") or vae.config["z_dim"]
    return Exportable(
        module=vae,
        call=lambda images: vae.encode(images, return_dict=False)[0].mode(),
        inputs=(Port("images", dtype, ("batch", 3, *frames, "height", "width")),),
        outputs=(Port("latents", dtype, ("batch", channels, *frames, "latent_height", "latent_width")),),
        sizes=lambda height, width, references: {"height": height, "width": width},
        example={"batch": 2, "height": 4 * factor, "width": 6 * factor},
    )


def vae_decoder(vae: Any) -> Exportable:
    """Unnormalised latents to images in [−1, 1]."""
    dtype, factor, frames = float_dtype(vae), vae_factor(vae), _frames(vae)
    channels = vae.config.get("latent_channels") or vae.config["z_dim"]
    return Exportable(
        module=vae,
        call=lambda latents: vae.decode(latents, return_dict=False)[0],
        inputs=(Port("latents", dtype, ("batch", channels, *frames, "latent_height", "latent_width")),),
        outputs=(Port("images", dtype, ("batch", 3, *frames, "height", "width")),),
        sizes=lambda height, width, references: {"latent_height": height // factor, "latent_width": width // factor},
        example={"batch": 2, "latent_height": 4, "latent_width": 6},
    )


def vae_factor(vae: Any) -> int:
    """Pixels per latent along a side."""
    if "block_out_channels" in vae.config:
        return 2 ** (len(vae.config.block_out_channels) - 1)
    return 2 ** len(vae.temperal_downsample)


def _frames(vae: Any) -> tuple[int, ...]:
    return () if "block_out_channels" in vae.config else (1,)


def dino(model: Any, *, image_size: int | None = None) -> Exportable:
    """A transformers ViT (`Dinov2Model`, `DINOv3ViTModel`): normalised pixels to [CLS, registers, patches].

    image_size: side of the images for models with learned positions (DINOv2), which are fixed to one size; default: the
        config's. Models with rotary positions (DINOv3) stay dynamic.
    """
    dtype, config = float_dtype(model), model.config
    dynamic = hasattr(model, "rope_embeddings")
    side = image_size or config.image_size
    shape: tuple[int | str, ...] = ("height", "width") if dynamic else (side, side)
    patch = config.patch_size
    tokens: int | str = "tokens" if dynamic else 1 + (side // patch) ** 2 + getattr(config, "num_register_tokens", 0)
    return Exportable(
        module=model,
        call=lambda pixel_values: model(pixel_values=pixel_values).last_hidden_state,
        inputs=(Port("pixel_values", dtype, ("batch", config.num_channels, *shape)),),
        outputs=(Port("last_hidden_state", dtype, ("batch", tokens, config.hidden_size)),),
        sizes=lambda height, width, references: {"height": height, "width": width},
        example={"batch": 2, "height": 4 * patch, "width": 6 * patch},
    )


def clip_text(model: Any) -> Exportable:
    """`CLIPTextModel` as Flux pipelines call it: the pooled output of [batch, tokens] ids."""
    tokens, config = model.config.max_position_embeddings, model.config
    return Exportable(
        module=model,
        call=lambda input_ids: _both(model(input_ids, output_hidden_states=False)),
        inputs=(Port("input_ids", "int64", ("batch", "text")),),
        outputs=(
            Port("last_hidden_state", float_dtype(model), ("batch", "text", config.hidden_size)),
            Port("pooler_output", float_dtype(model), ("batch", config.hidden_size)),
        ),
        sizes=lambda height, width, references: {"text": tokens},
        example={"batch": 2, "text": min(tokens, 7)},
    )


def _both(output: Any) -> tuple[Tensor, Tensor]:
    return output.last_hidden_state, output.pooler_output


def t5_text(model: Any, *, text_tokens: int = 512) -> Exportable:
    """`T5EncoderModel`: hidden states of [batch, tokens] ids, which all count."""
    return Exportable(
        module=model,
        call=lambda input_ids: model(input_ids, output_hidden_states=False)[0],
        inputs=(Port("input_ids", "int64", ("batch", "text")),),
        outputs=(Port("last_hidden_state", float_dtype(model), ("batch", "text", model.config.d_model)),),
        sizes=lambda height, width, references: {"text": text_tokens},
        example={"batch": 2, "text": 7},
    )


def generator(
    model: nn.Module, inputs: Sequence[Port], outputs: Sequence[Port], *, example: Mapping[str, int], sizes: Sizes
) -> Exportable:
    """Any module whose forward takes tensors by the inputs' names, such as a one-step restoration generator.

    model: returns one tensor, or a tuple of them in the order of `outputs`.
    example, sizes: as in `Exportable`.
    """
    return Exportable(
        model,
        lambda **tensors: model(**tensors),
        tuple(inputs),
        tuple(outputs),
        sizes=sizes,
        example=example,
        plain=len(outputs) == 1,
    )
