"""The C++ and CUDA kernels: hands data pointers to `mtedit_fast._C`, which knows nothing of torch.

Arguments are those of the ops of the same names, already checked there. `crop_resize` runs on its images' device, the
others on the CPU.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_C: Any = None
_reason: str | None = None
try:  # after torch, so that both share one OpenMP runtime and its threads
    _C = import_module("mtedit_fast._C")
except ImportError as error:
    _reason = f"the C++ extension is not built ({error}): install g++, then mtedit-fast again"

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PIXEL_CODES = _DTYPE_CODES | {torch.uint8: 3}
LOG_PROB_NONE, LOG_PROB_GAUSSIAN, LOG_PROB_SQUARED = 0, 1, 2


def unavailable_reason() -> str | None:
    """Why the C++ kernels cannot run, or None if they can."""
    return _reason


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot run, or None if they can."""
    if _reason is not None or _C.cuda_archs:
        return _reason
    return "the C++ extension was built without CUDA: install nvcc, then mtedit-fast again"


def _array(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype])


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _per_sample(step: int | Tensor, batch: int) -> Tensor:
    if isinstance(step, Tensor):
        return step.to(torch.int64).expand(batch).contiguous()
    return torch.full((batch,), step, dtype=torch.int64)


class _Step:
    """The arguments that forward and backward share, contiguous and kept alive while C++ reads them."""

    def __init__(
        self,
        sample: Tensor,
        velocity: Tensor,
        table: Tensor,
        step: int | Tensor,
        noise: Tensor | None,
        seed: Tensor | None,
        prev_sample: Tensor | None,
        out_dtype: torch.dtype,
        log_prob_mode: int,
        round_before: bool,
    ):
        batch = sample.shape[0]
        self.sample, self.velocity, self.table = sample.contiguous(), velocity.contiguous(), table.contiguous()
        self.step = _per_sample(step, batch)
        self.noise, self.seed, self.prev_sample = (
            None if tensor is None else tensor.contiguous() for tensor in (noise, seed, prev_sample)
        )
        self.arguments = (
            _array(self.sample),
            _array(self.velocity),
            _array(self.noise),
            _array(self.prev_sample),
            _pointer(self.seed),
            _pointer(self.table),
            _pointer(self.step),
            self.table.shape[0],
            batch,
            sample[0].numel() if batch else 0,
            _DTYPE_CODES[out_dtype],
            log_prob_mode,
            round_before,
            torch.get_num_threads(),
        )


def sde_step_forward(
    sample: Tensor,
    velocity: Tensor,
    table: Tensor,
    step: int | Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prev_sample: Tensor | None,
    out_dtype: torch.dtype,
    log_prob_mode: int,
    round_before: bool,
    want_mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """prev_sample (the given one on replay), log_prob [B] fp32 (None in mode 0) and the fp32 mean (None if unwanted).

    Raises:
        ValueError: a step is stochastic and has no source of randomness.
    """
    args = _Step(sample, velocity, table, step, noise, seed, prev_sample, out_dtype, log_prob_mode, round_before)
    new = torch.empty(sample.shape, dtype=out_dtype) if prev_sample is None else None
    log_prob = torch.empty(sample.shape[0]) if log_prob_mode != LOG_PROB_NONE else None
    mean = torch.empty(sample.shape) if want_mean else None
    _C.sde_step_forward(*args.arguments, _pointer(new), _pointer(log_prob), _pointer(mean))
    result = prev_sample if new is None else new
    assert result is not None
    return result, log_prob, mean


def sde_step_backward(
    sample: Tensor,
    velocity: Tensor,
    table: Tensor,
    step: int | Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    prev_sample: Tensor | None,
    out_dtype: torch.dtype,
    log_prob_mode: int,
    round_before: bool,
    grad_prev: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_mean: Tensor | None,
    needs_sample: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients (sample's, or None; velocity's), in their dtypes; an incoming gradient may be None.

    The first ten arguments are the forward's. Where the log-prob was taken on the rounded sample, passing the
    forward's result as `prev_sample` in place of its noise gives the same gradient without drawing it again.
    """
    args = _Step(sample, velocity, table, step, noise, seed, prev_sample, out_dtype, log_prob_mode, round_before)
    upstream = None if grad_prev is None else grad_prev.contiguous()
    log_prob = None if grad_log_prob is None else grad_log_prob.float().contiguous()
    mean = None if grad_mean is None else grad_mean.float().contiguous()
    grad_sample = torch.empty_like(args.sample) if needs_sample else None
    grad_velocity = torch.empty_like(args.velocity)
    _C.sde_step_backward(
        *args.arguments,
        _array(upstream),
        _pointer(log_prob),
        _pointer(mean),
        _pointer(grad_sample),
        _pointer(grad_velocity),
    )
    return grad_sample, grad_velocity


def seeded_noise(seed: Tensor, numel: int, step: int | Tensor, dtype: torch.dtype) -> Tensor:
    """[B, numel] standard normals of counter step `step`."""
    seed = seed.contiguous()
    steps = _per_sample(step, seed.shape[0])
    noise = torch.empty(seed.shape[0], numel, dtype=dtype)
    arguments = (seed.shape[0], numel, noise.data_ptr(), _DTYPE_CODES[dtype], torch.get_num_threads())
    _C.seeded_noise(seed.data_ptr(), steps.data_ptr(), *arguments)
    return noise


def _velocities(
    v_theta: Tensor, v_old: Tensor | None, v_target: Tensor, v_ref: Tensor | None
) -> tuple[tuple[int, int] | int, ...]:
    """The arguments that the losses' two passes share; tensors are contiguous."""
    batch = v_theta.shape[0]
    sizes = (batch, v_theta[0].numel() if batch else 0, torch.get_num_threads())
    return (*map(_array, (v_theta, v_old, v_target, v_ref)), *sizes)


def velocity_moments(
    v_theta: Tensor, v_old: Tensor | None, v_target: Tensor, v_ref: Tensor | None, *, mixed: bool, beta: float = 0.0
) -> Tensor:
    """[5, B] fp32, as `_velocity_loss.velocity_moments` has them."""
    means = torch.empty(5, v_theta.shape[0])
    _C.velocity_moments(*_velocities(v_theta, v_old, v_target, v_ref), mixed, beta, means.data_ptr())
    return means


def velocity_loss_backward(
    v_theta: Tensor, v_old: Tensor | None, v_target: Tensor, v_ref: Tensor | None, coefficients: Tensor, grad: Tensor
) -> Tensor:
    """The gradient to v_theta, in its dtype."""
    slopes = (coefficients * grad).contiguous()
    out = torch.empty_like(v_theta)
    velocities = _velocities(v_theta, v_old, v_target, v_ref)
    _C.velocity_loss_backward(*velocities, slopes.data_ptr(), out.data_ptr())
    return out


def _tokens(
    tokens: Tensor, index: Tensor, weights: Tensor | None, normalize: bool
) -> tuple[tuple[int, int] | tuple[int, ...] | int, ...]:
    """The arguments that pooling and its gradient share; index and weights are contiguous."""
    shape = (*tokens.shape, *tokens.stride()[:2])
    return _array(tokens), shape, _pointer(index), len(index), _pointer(weights), normalize, torch.get_num_threads()


def token_pool(tokens: Tensor, index: Tensor, weights: Tensor | None, normalize: bool) -> Tensor:
    """[P, D] fp32: weighted sums of the tokens [M, N, D], each contiguous, of rows `index` [P]."""
    if weights is None and len(index) != len(tokens):  # once per row, however many pairs it is in
        return token_pool(tokens, torch.arange(len(tokens)), None, normalize).index_select(0, index)
    out = torch.empty(len(index), tokens.shape[2])
    index, weights = index.contiguous(), None if weights is None else weights.contiguous()
    _C.token_pool(*_tokens(tokens, index, weights, normalize), out.data_ptr())
    return out


def token_pool_backward(
    tokens: Tensor, index: Tensor, weights: Tensor | None, grad_pooled: Tensor, normalize: bool
) -> Tensor:
    """[M, N, D] in the tokens' dtype, of the gradient [P, D] fp32 of what `token_pool` returns."""
    out = torch.empty(tokens.shape, dtype=tokens.dtype)
    index, grad_pooled = index.contiguous(), grad_pooled.contiguous()
    weights = None if weights is None else weights.contiguous()
    _C.token_pool_backward(*_tokens(tokens, index, weights, normalize), grad_pooled.data_ptr(), out.data_ptr())
    return out


def _readable(batch: Tensor) -> Tensor:
    """[B, C, H, W] whose rows C++ can read: pixels side by side, or their channels. A copy only where they are not."""
    channel, _, pixel = batch.stride()[1:]
    if batch.is_cuda or pixel == 1 or batch.shape[3] == 1 or (channel == 1 and batch.shape[1] <= pixel <= 4):
        return batch
    return batch.clone(memory_format=torch.contiguous_format)


def _describe(batch: Tensor) -> list[int]:
    """data_ptr, height, width, row, pixel and channel stride of the first image."""
    channel, row, pixel = batch.stride()[1:]
    return [batch.data_ptr(), *batch.shape[2:], row, 1 if batch.shape[3] == 1 else pixel, channel]


def crop_resize(
    batches: list[Tensor],
    boxes: Tensor,
    index: Tensor,
    height: int,
    width: int,
    cubic: bool,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """[n, C, height, width] of one [B, C, H, W] or several [1, C, H, W]."""
    batches = [_readable(batch) for batch in batches]
    first = batches[0]
    device = first.device
    boxes, index = boxes.contiguous(), index.contiguous()
    table, count = None, first.shape[0]
    if len(batches) > 1:
        count = len(batches)
        table = torch.tensor([_describe(batch) for batch in batches])
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
    out = torch.empty(boxes.shape[0], first.shape[1], height, width, dtype=dtype, device=device)
    arguments = (
        (*_describe(first), first.stride(0), count, _pointer(table)),
        _PIXEL_CODES[first.dtype],
        boxes.data_ptr(),
        index.data_ptr(),
        tuple(out.shape),
        cubic,
        [1 / s for s in std],
        [-m / s for m, s in zip(mean, std, strict=True)],
        _array(out),
    )
    if device.type == "cpu":
        _C.crop_resize(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            _C.crop_resize_cuda(*arguments, torch.cuda.current_stream().cuda_stream, device.index)
    return out
