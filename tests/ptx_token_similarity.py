"""Compiles the kernels of `token_similarity` for every architecture: `python tests/ptx_token_similarity.py`."""

from ptx import EVERY, report, show

from mtedit_fast.kernels import token_similarity as kernels

INTEGERS = ("a_rows", "b_rows", "a_tokens", "b_tokens", "tokens", "width", "a_tiles", "tiles", "slope_stride")
STRIDES = ("a_row_stride", "b_row_stride", "a_token_stride", "b_token_stride", "row_stride", "token_stride")
TOKENS = ("a_ptr", "b_ptr", "tokens_ptr", "out_ptr")
INDICES = ("index_a_ptr", "index_b_ptr", "order_ptr", "bounds_ptr")
WEIGHTS = ("weights_a_ptr", "weights_b_ptr", "weights_ptr")
FP32 = (*WEIGHTS, "partial_ptr", "similarity_ptr", "slopes_ptr", "slope_ptr", "grad_ptr")

SIGNATURE = dict.fromkeys((*INTEGERS, *STRIDES), "i32") | dict.fromkeys(TOKENS, "*bf16") | dict.fromkeys(FP32, "*fp32")
SIGNATURE |= dict.fromkeys(INDICES, "*i64") | {"NORMALIZE": True}
PLAIN = dict.fromkeys(TOKENS, "*fp32") | dict.fromkeys(WEIGHTS) | {"NORMALIZE": False}
KERNELS = {"pool": kernels._pool_kernel, "cosine": kernels._cosine_kernel, "gradient": kernels._gradient_kernel}
EVEN = (*STRIDES, "width", "slope_stride")  # where D is a multiple of 16


def main() -> None:
    options = {"num_warps": kernels.NUM_WARPS}
    even = options | {"divisible": EVEN}
    for width, archs in ((64, (90,)), (768, EVERY), (4096, (90,))):
        for name, kernel in KERNELS.items():
            for arch in archs:
                show(f"{name} {width}", arch, report(kernel, SIGNATURE | kernels.blocks(name, width), arch, **even))
    for name, kernel in KERNELS.items():
        show(f"{name} odd", 90, report(kernel, SIGNATURE | kernels.blocks(name, 768), 90, **options))
        show(f"{name} plain", 90, report(kernel, SIGNATURE | kernels.blocks(name, 768) | PLAIN, 90, **even))


if __name__ == "__main__":
    main()
