"""What `token_similarity` refuses, and that the message names the argument and the remedy."""

import re

import pytest
import torch

from mtedit_fast.ops import token_similarity

A, B = torch.randn(3, 6, 9), torch.randn(4, 6, 9)
PAIRS = torch.tensor([[0, 1], [2, 3]])
WEIGHTS = torch.rand(2, 6)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "a must be a floating-point tensor, got list", {"a": [1.0]}),
        (TypeError, "b must be a floating-point tensor, got torch.int64", {"b": torch.ones(4, 6, 9).long()}),
        (ValueError, "a must be [rows, tokens, D] with at least one token, got [6, 9]", {"a": A[0]}),
        (ValueError, "b must be [rows, tokens, D] with at least one token, got [4, 0, 9]", {"b": B[:, :0]}),
        (TypeError, "b must have a's dtype torch.float32, got torch.bfloat16; cast one of them", {"b": B.bfloat16()}),
        (ValueError, "b must have a's D = 9, got [4, 6, 8]", {"b": B[..., :8]}),
        (ValueError, "b must be on a's device cpu, got meta", {"b": B.to("meta")}),
        (ValueError, "pairs must be given for banks of 3 and 4 rows; got None", {"pairs": None}),
        (TypeError, "pairs must be an int64 tensor, got list; use torch.tensor(pairs)", {"pairs": [[0, 1]]}),
        (TypeError, "pairs must be an int64 tensor, got torch.int32", {"pairs": PAIRS.int()}),
        (ValueError, "pairs must be [P, 2], got [2]", {"pairs": PAIRS[0]}),
        (ValueError, "pairs must be on a's device cpu, got meta", {"pairs": PAIRS.to("meta")}),
        (ValueError, "pairs must be empty for banks of 0 and 4 rows, got 2", {"a": A[:0]}),
        (ValueError, "pairs must name rows 0…2 of a, got 1…3", {"pairs": PAIRS.flip(1)}),
        (ValueError, "pairs must name rows 0…3 of b, got -1…3", {"pairs": torch.tensor([[0, -1], [0, 3]])}),
        (TypeError, "weights must be a tensor, or a tuple of one for a and one for b", {"weights": [[1.0]]}),
        (TypeError, "weights must be a tensor, or a tuple of one for a and one for b", {"weights": (WEIGHTS,)}),
        (TypeError, "weights must be floating-point or bool, got torch.int64", {"weights": WEIGHTS.long()}),
        (ValueError, "weights of a must be [P, tokens] = [2, 6], got [1, 6]", {"weights": WEIGHTS[:1]}),
        (ValueError, "weights of b must be [P, tokens] = [2, 6], got [2, 5]", {"weights": (WEIGHTS, WEIGHTS[:, 1:])}),
        (ValueError, "weights of b must be [P, tokens] = [2, 5], got [2, 6]", {"b": B[:, 1:], "weights": WEIGHTS}),
        (ValueError, "weights must be on a's device cpu, got meta", {"weights": WEIGHTS.to("meta")}),
        (ValueError, "backend must be one of ('auto', 'reference', ", {"backend": "numpy"}),
        (ValueError, "'triton'), got 'cuda'", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(error, message, change) -> None:
    arguments = {"a": A, "b": B, "pairs": PAIRS, "weights": None} | change
    with pytest.raises(error, match=re.escape(message)):
        token_similarity(**arguments)


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_an_asked_backend_never_falls_back(name: str) -> None:
    with pytest.raises(ValueError, match=rf"backend='{name}' is not available: it computes in fp32 and takes"):
        token_similarity(A.double(), B.double(), PAIRS, backend=name)
