"""Compiles the kernels of `token_similarity` for sm_80, sm_90 and sm_100, which takes no GPU.

python tests/ptx_token_similarity.py    one JSON object per line: kernel, arch, registers, stack, local, fp64, fused
"""

import json

from ptx_report import report

from mtedit_fast.kernels import token_similarity as kernels

INTEGERS = ("a_rows", "b_rows", "a_tokens", "b_tokens", "tokens", "width", "a_tiles", "tiles", "slope_stride")
STRIDES = ("a_row_stride", "b_row_stride", "a_token_stride", "b_token_stride", "row_stride", "token_stride")
TOKENS = ("a_ptr", "b_ptr", "tokens_ptr", "out_ptr")
INDICES = ("index_a_ptr", "index_b_ptr", "order_ptr", "bounds_ptr")
WEIGHTS = ("weights_a_ptr", "weights_b_ptr", "weights_ptr")
FP32 = (*WEIGHTS, "partial_ptr", "similarity_ptr", "slopes_ptr", "slope_ptr", "grad_ptr")

SIGNATURE = dict.fromkeys((*INTEGERS, *STRIDES), "i32") | dict.fromkeys(TOKENS, "*bf16") | dict.fromkeys(FP32, "*fp32")
SIGNATURE |= dict.fromkeys(INDICES, "*i64") | {"TOKENS": kernels.TOKENS, "NORMALIZE": True}
PLAIN = dict.fromkeys(TOKENS, "*fp32") | dict.fromkeys(WEIGHTS) | {"NORMALIZE": False}
KERNELS = {"pool": kernels._pool_kernel, "cosine": kernels._cosine_kernel, "gradient": kernels._gradient_kernel}


def main() -> None:
    for width, archs in ((64, (90,)), (768, (80, 90, 100)), (4096, (90,))):
        for name, kernel in KERNELS.items():
            for arch in archs:
                row = report(kernel, SIGNATURE | kernels._blocks(width), arch)
                print(json.dumps({"kernel": f"{name} {width}", "arch": arch} | row), flush=True)
    for name, kernel in KERNELS.items():
        row = report(kernel, SIGNATURE | kernels._blocks(768) | PLAIN, 90)
        print(json.dumps({"kernel": f"{name} plain", "arch": 90} | row), flush=True)


if __name__ == "__main__":
    main()
