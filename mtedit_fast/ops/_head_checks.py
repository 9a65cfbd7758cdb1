"""What the ops on a language model's head, `digit_score` and `token_log_probs`, ask of their common arguments."""

import math

import torch
from torch import Tensor


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, vocab_size: int | None) -> int:
    """The number of rows of the weight that are tokens. Raises on bad arguments; never waits for a device."""
    for name, tensor in (("hidden", hidden), ("weight", weight)) + ((("bias", bias),) if bias is not None else ()):
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype}, got {tensor.dtype}; cast one of them")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [vocabulary, H] with at least one row and column, got {list(weight.shape)}")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must end in weight's H = {weight.shape[1]}, got {list(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [vocabulary] = [{weight.shape[0]}], got {list(bias.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}; 1.0 leaves the logits as they are")
    if vocab_size is None:
        return weight.shape[0]
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be an integer in 1…{weight.shape[0]}, the rows of weight, got {vocab_size}")
    return vocab_size


def check_index(name: str, index: Tensor, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    if index.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} as hidden is, got {list(index.shape)}")
    if index.device != device:
        raise ValueError(f"{name} must be on hidden's device {device}, got {index.device}")


def on_host(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel() > 0
