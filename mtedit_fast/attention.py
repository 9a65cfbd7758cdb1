"""Which of torch's attention kernels may be chosen."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Attention by torch's other kernels than cuDNN's, which it prefers for half precision on Hopper.

    cuDNN plans anew for every shape, and with gradient otherwise than without. So this is for an exact replay, where
    the bits have to be the rollout's, backward included, in which checkpointed blocks run once more; and for answers
    written token by token, each of which is a new shape.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
