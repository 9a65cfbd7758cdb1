"""Which of torch's attention kernels may be chosen."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside, _before = 0, True
"""Torch's switch is the process's, and rewards are scored in a thread of their own: the last one out sets it back."""


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Attention by torch's other kernels than cuDNN's, which it prefers for half precision on Hopper.

    cuDNN plans anew for every shape, and with gradient otherwise than without. So this is for an exact replay, where
    the bits have to be the rollout's, backward included, in which checkpointed blocks run once more; and for answers
    written token by token, each of which is a new shape.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(_before)
