"""Which attention kernels torch may choose: a switch of the process that several threads turn."""

import torch

from mtedit_fast.attention import without_cudnn_attention


def test_the_last_one_out_sets_the_switch_back():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    for order in ((0, 1), (1, 0)):  # threads leave in any order
        both = [without_cudnn_attention() for _ in range(2)]
        for context in both:
            context.__enter__()
            assert not enabled()
        both[order[0]].__exit__(None, None, None)
        assert not enabled()
        both[order[1]].__exit__(None, None, None)
        assert enabled() == before
