"""What `attention_columns` refuses, and that the message names the argument and the remedy."""

import math
import re

import pytest
import torch

from mtedit_fast.ops import attention_columns

QUERY, KEY = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
COLUMNS = torch.tensor([0, 6])
MASK = torch.ones(2, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "query must be a floating-point tensor, got list", {"query": [1.0]}),
        (TypeError, "key must be a floating-point tensor, got torch.int64", {"key": KEY.long()}),
        (ValueError, "query must be [B, H, length, D] with at least one head, got [3, 5, 8]", {"query": QUERY[0]}),
        (ValueError, "with at least one head, got [2, 0, 5, 8]", {"query": QUERY[:, :0], "key": KEY[:, :0]}),
        (TypeError, "key must have query's dtype torch.float32, got torch.bfloat16; cast", {"key": KEY.bfloat16()}),
        (ValueError, "key must be on query's device cpu, got meta", {"key": KEY.to("meta")}),
        (ValueError, "key must be [B, H, length, D] = [2, 3, length, 8], got [1, 3, 7, 8]", {"key": KEY[:1]}),
        (ValueError, "got [2, 1, 7, 8]; repeat the heads that queries share", {"key": KEY[:, :1]}),
        (ValueError, "key must be [B, H, length, D] = [2, 3, length, 8], got [2, 3, 7, 4]", {"key": KEY[..., :4]}),
        (ValueError, "key must hold at least one key, got [2, 3, 0, 8]", {"key": KEY[:, :, :0], "mask": MASK[:, :0]}),
        (TypeError, "columns must be an int64 tensor, got list; use torch.tensor(columns)", {"columns": [0, 6]}),
        (TypeError, "columns must be an int64 tensor, got torch.int32", {"columns": COLUMNS.int()}),
        (ValueError, "columns must be [C] or [B, C] = [2, C], got []", {"columns": COLUMNS[0]}),
        (ValueError, "columns must be [C] or [B, C] = [2, C], got [3, 2]", {"columns": COLUMNS.expand(3, 2)}),
        (ValueError, "columns must be on query's device cpu, got meta", {"columns": COLUMNS.to("meta")}),
        (ValueError, "columns must name keys 0…6, got 1…7", {"columns": COLUMNS + 1}),
        (ValueError, "columns must name keys 0…6, got -1…5", {"columns": COLUMNS - 1}),
        (TypeError, "scale must be a number or None, got Tensor", {"scale": torch.tensor(0.1)}),
        (TypeError, "scale must be a number or None, got bool", {"scale": True}),
        (ValueError, "scale must be finite, got nan", {"scale": math.nan}),
        (TypeError, "mask must be a bool tensor, True for keys that count, got list", {"mask": [True]}),
        (TypeError, "mask must be a bool tensor, True for keys that count, got torch.float32", {"mask": MASK.float()}),
        (ValueError, "mask must be [B, Lk] = [2, 7], got [7]", {"mask": MASK[0]}),
        (ValueError, "mask must be [B, Lk] = [2, 7], got [2, 5]", {"mask": MASK[:, :5]}),
        (ValueError, "mask must be on query's device cpu, got meta", {"mask": MASK.to("meta")}),
        (ValueError, "reduce must be 'heads' or 'none', got 'mean'", {"reduce": "mean"}),
        (ValueError, "backend must be one of ('auto', 'reference', ", {"backend": "numpy"}),
        (ValueError, "'triton'), got 'cpp'", {"backend": "cpp"}),
    ],
)
def test_bad_arguments_are_named(error, message, change) -> None:
    arguments = {"query": QUERY, "key": KEY, "columns": COLUMNS, "mask": MASK} | change
    with pytest.raises(error, match=re.escape(message)):
        attention_columns(**arguments)


def test_an_asked_backend_never_falls_back() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' is not available: it computes in fp32 and takes"):
        attention_columns(QUERY.double(), KEY.double(), COLUMNS, backend="triton")
