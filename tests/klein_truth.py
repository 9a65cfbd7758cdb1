"""The stock Klein pipelines one image at a time, and the whole computation that Klein-KV's cache stands for."""

import torch
from PIL import Image
from tiny_families import tiny_klein_kv
from torch.utils._python_dispatch import TorchDispatchMode

from mtedit_fast.editors.klein import reference_times
from mtedit_fast.editors.klein_kv import KleinKVEditor
from mtedit_fast.ops import sde_coefficients, sde_step
from mtedit_fast.training.adapters import Adapters

PROMPTS = ["remove the red circle", "add a blue square to the circle now please"]
HEIGHT, WIDTH, LENGTH = 64, 72, 16
TOKENS = (HEIGHT // 4) * (WIDTH // 4)
SMALL = (16, 24)
SMALL_TOKENS = 4 * 6
OPTIONS = {"height": SMALL[0], "width": SMALL[1]}


def references(count=2, size=(HEIGHT, WIDTH)):
    torch.manual_seed(1)
    return (torch.rand(count, 3, *size) * 255).round() / 255


def picture(image):
    return Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())


def stock(pipeline, images, prompt, latents, **options):
    return pipeline(
        image=[picture(image) for image in images],
        prompt=prompt,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=3,
        max_sequence_length=LENGTH,
        latents=latents.transpose(1, 2).unflatten(2, (HEIGHT // 4, WIDTH // 4)),
        output_type="pt",
        **options,
    ).images


def edit(editor, images, latents, **options):
    """Three Euler steps, conditioned once."""
    text, reference = editor.encode_text(PROMPTS), editor.encode_image(images)
    schedule = editor.schedule(3, HEIGHT, WIDTH)
    coefficients = sde_coefficients(schedule.sigmas, variant="ode")
    with torch.no_grad():
        condition = editor.condition(reference, text, height=HEIGHT, width=WIDTH, **options)
        for step in range(3):
            velocity = editor.velocity(latents, schedule.timesteps[step], condition)
            latents = sde_step(latents, velocity, coefficients, step).prev_sample
    return editor.decode(latents, HEIGHT, WIDTH)


class NoSync(TorchDispatchMode):
    """Fails where a device would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def forbid_reads(monkeypatch):
    def read(*_):
        raise AssertionError("a value was read from the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, read)


def editor_of(dtype=torch.float32, **options):
    return KleinKVEditor(tiny_klein_kv().to(dtype=dtype), max_sequence_length=LENGTH, **options)


def adapters_of(editor, *, old=True):
    """θ and the old policy random and different."""
    own = Adapters(editor.transformer, rank=2, alpha=4, target_modules=editor.lora_targets, seed=0, old=old)
    generator = torch.Generator().manual_seed(3)
    for decay in (0.0, 1.0):
        with torch.no_grad():
            for parameter in own.parameters:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        own.stepped()
        if old:
            own.update_old(decay)
    return own


def samples(editor, rows, *, count=1, seed=5, size=SMALL):
    """Latents, timesteps, references of every row (drawn from `max(rows) + 1` different sets) and text."""
    torch.manual_seed(seed)
    images = torch.rand(max(rows) + 1, count, 3, *size, dtype=torch.float64).to(editor.dtype)
    latents = torch.randn(len(rows), SMALL_TOKENS, 16, dtype=torch.float64).to(editor.dtype)
    timestep = torch.linspace(950, 50, len(rows), dtype=torch.float64)
    text = editor.encode_text([PROMPTS[row % 2] for row in range(len(rows))])
    return latents, timestep, editor.encode_image(images)[rows], text


def uncached(editor, latents, timestep, reference, text, *, count=1, size=SMALL):
    """The library's whole forward, references in the sequence of every row."""
    ids = editor._image_ids(*reference_times(count, size), (0, SMALL))
    return editor.transformer(
        hidden_states=torch.cat([reference, latents], 1),
        timestep=timestep.to(latents.dtype) / 1000,
        encoder_hidden_states=text["embeds"],
        txt_ids=editor._text_ids(text["embeds"].shape[1]),
        img_ids=ids,
        return_dict=False,
        kv_cache_mode="extract",
        num_ref_tokens=reference.shape[1],
    )


def velocity(editor, latents, timestep, reference, text):
    return editor.velocity(latents, timestep, editor.condition(reference, text, **OPTIONS))


def exact_rotation(x, freqs, sequence_dim):
    """The library's rounds to fp32, which hides the last eight digits."""
    cosine, sine = (part[None, :, None].to(x.dtype) for part in freqs)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack([-imaginary, real], -1).flatten(3) * sine


def gradients(own):
    found = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in own.parameters]
    for parameter in own.parameters:
        parameter.grad = None
    return found
