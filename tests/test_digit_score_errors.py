"""What `digit_score` refuses, and that the message names the argument and the remedy."""

import re

import pytest
import torch

from mtedit_fast.ops import digit_score

H, W, B = torch.randn(3, 8), torch.randn(20, 8), torch.randn(20)
T = torch.tensor([0, -1, 1])
NAN = float("nan")


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "hidden must be a floating-point tensor, got torch.int64", {"hidden": H.long()}),
        (TypeError, "weight must have hidden's dtype torch.float32, got torch.bfloat16", {"weight": W.bfloat16()}),
        (ValueError, "hidden must be [N, H], got [3, 1, 8]; flatten it first", {"hidden": H[:, None]}),
        (ValueError, "hidden must end in weight's H = 8, got []", {"hidden": torch.tensor(1.0)}),
        (ValueError, "weight must be [vocabulary, H] with at least one row and column, got [0, 8]", {"weight": W[:0]}),
        (TypeError, "token_ids must be a list of numbers, got Tensor; use .tolist()", {"token_ids": torch.arange(2)}),
        (TypeError, "token_ids must be a list of numbers, got str", {"token_ids": "12"}),
        (TypeError, "token_ids must be integers, got 1.0; ask the tokenizer", {"token_ids": [1.0, 2.0]}),
        (TypeError, "token_ids must be integers, got None; ask the tokenizer", {"token_ids": [None, 2]}),
        (ValueError, "token_ids must be distinct and lie in 0…19, got [4, 4]", {"token_ids": [4, 4]}),
        (ValueError, "token_ids must be distinct and lie in 0…19, got [4, 20]", {"token_ids": [4, 20]}),
        (ValueError, "token_ids must be distinct and lie in 0…4, got [3, 5]", {"vocab_size": 5}),
        (ValueError, "token_ids must be distinct and lie in 0…19, got [-1, 4]", {"token_ids": [-1, 4]}),
        (ValueError, "token_ids must be distinct and lie in 0…19, got []", {"token_ids": [], "values": []}),
        (ValueError, "values must be 2 finite numbers, one for each of token_ids, got [1.0]", {"values": [1]}),
        (
            ValueError,
            "values must be 2 finite numbers, one for each of token_ids, got [1.0, nan]",
            {"values": [1, NAN]},
        ),
        (TypeError, "values must be a list of numbers, got float", {"values": 1.0}),
        (ValueError, "normalize must be 'set' or 'vocab', got 'all'", {"normalize": "all"}),
        (ValueError, "temperature must be finite and > 0, got -1", {"temperature": -1}),
        (ValueError, "vocab_size must be an integer in 1…20, the rows of weight, got 0", {"vocab_size": 0}),
        (ValueError, "bias must be [vocabulary] = [20], got [20, 1]", {"bias": B[:, None]}),
        (TypeError, "target must be an int64 tensor, got list", {"target": [0, 1, 1]}),
        (TypeError, "target must be an int64 tensor, got torch.float32", {"target": T.float()}),
        (ValueError, "target must be [3] as hidden is, got [2]", {"target": T[:2]}),
        (ValueError, "target must be on hidden's device cpu, got meta", {"target": T.to("meta")}),
        (ValueError, "target must lie in 0…1, the index of a token, or be -1; got -2…2", {"target": 2 * T}),
        (ValueError, "backend must be one of ('auto', 'reference', ", {"backend": "numpy"}),
        (ValueError, "'triton'), got 'cpp'", {"backend": "cpp"}),
    ],
)
def test_bad_arguments_are_named(error, message, change) -> None:
    arguments = {"hidden": H, "weight": W, "token_ids": [3, 5], "values": [0, 1]} | change
    with pytest.raises(error, match=re.escape(message)):
        digit_score(**arguments)


def test_an_asked_backend_never_falls_back() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' is not available: it computes in fp32 and takes"):
        digit_score(H.double(), W.double(), [1, 2], [0, 1], backend="triton")


def test_a_kernel_holds_so_many_tokens() -> None:
    from mtedit_fast.ops.digit_score import MOST_TOKENS, _choose

    many = range(MOST_TOKENS + 1)
    out = digit_score(H, torch.randn(300, 8), many, many)
    assert out.score.shape == (3,)
    assert _choose("auto", H, len(many), "vocab") == "reference"
    with pytest.raises(ValueError, match=r"backend='triton' is not available: it (takes at most 256|runs on CUDA)"):
        digit_score(H, torch.randn(300, 8), many, many, backend="triton")
