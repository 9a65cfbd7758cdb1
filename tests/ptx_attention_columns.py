"""Compiles the kernels of `attention_columns` for every architecture: `python tests/ptx_attention_columns.py`."""

import torch
from ptx import EVERY, report, show

from mtedit_fast.kernels import attention_columns as forward
from mtedit_fast.kernels import attention_columns_backward as backward

INTEGERS = ("heads", "groups", "queries", "keys", "count", "query_head_stride", "key_head_stride")
STRIDES = ("query_batch_stride", "query_stride", "key_batch_stride", "key_stride")
ROWS = ("query_ptr", "key_ptr")
FLAGS = ("mask_ptr", "others_ptr")
FP32 = ("grad_ptr", "times_ptr", "lse_ptr", "slopes_ptr", "delta_ptr")

SIGNATURE = dict.fromkeys((*INTEGERS, *STRIDES), "i32") | dict.fromkeys(FP32, "*fp32") | dict.fromkeys(FLAGS, "*i32")
SIGNATURE |= {"columns_ptr": "*i64", "scale": "fp32"}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TILED = {"lse": forward._lse_kernel, "grad_query": backward._grad_query_kernel, "grad_key": backward._grad_key_kernel}
FEW = {"columns": forward._columns_kernel, "slopes": backward._slopes_kernel}
CASES = (
    (torch.bfloat16, 128, EVERY),
    (torch.float32, 128, EVERY),
    (torch.float16, 128, (80,)),
    (torch.bfloat16, 72, (90,)),
)
EVEN = (*STRIDES, "query_head_stride", "key_head_stride")  # where D is a multiple of 16


def kernel_report(
    name: str, dtype: torch.dtype, width: int, arch: int, label: str = "", even: bool = True, **changes: None
) -> None:
    kernel = (TILED | FEW)[name]
    own = forward.blocks("few" if name in FEW else name, dtype, width)
    warps = own.pop("num_warps")
    pointers = dict.fromkeys(ROWS, POINTERS[dtype]) | {"out_ptr": "*fp32" if name in FEW else POINTERS[dtype]}
    stages = backward.SLOPES_STAGES if name == "slopes" else forward.STAGES
    signature = SIGNATURE | pointers | own | changes
    row = report(
        kernel,
        signature,
        arch,
        num_warps=warps,
        num_stages=stages,
        divisible=EVEN if even else (),
    )
    show(" ".join(filter(None, (name, POINTERS[dtype], str(width), label))), arch, row)


def main() -> None:
    for dtype, width, archs in CASES:
        for name in TILED | FEW:
            for arch in archs:
                kernel_report(name, dtype, width, arch, even=width % 16 == 0)
    for name in TILED | FEW:
        kernel_report(name, torch.bfloat16, 128, 90, "odd", even=False)
    for name in ("lse", "columns"):
        kernel_report(name, torch.bfloat16, 128, 90, "unmasked", mask_ptr=None)


if __name__ == "__main__":
    main()
