"""Compiles the kernels of `nft_loss` and `crd_loss` for every architecture: `python tests/ptx_velocity_loss.py`."""

from ptx import EVERY, report, show

from mtedit_fast.kernels import crd_loss, nft_loss

VELOCITIES = ("v_theta_ptr", "v_old_ptr", "v_target_ptr", "v_ref_ptr", "out_ptr")
ROWS = ("t_ptr", "r_ptr", "weight_ptr", "centre_ptr", "loss_ptr", "rows_ptr", "coefficients_ptr", "residual_ptr")
NUMBERS = ("beta", "scale", "kl_weight", "kl_floor")

SIGNATURE = dict.fromkeys(VELOCITIES, "*bf16") | dict.fromkeys(ROWS, "*fp32") | dict.fromkeys(NUMBERS, "fp32")
SIGNATURE |= {"partial_ptr": "*fp32", "arrived_ptr": "*i32", "grad_ptr": "*fp32", "groups_ptr": "*i64"}
SIGNATURE |= {"numel": "i64", "tiles": "i32", "ADAPTIVE": True, "BLOCK": nft_loss.BLOCK}
GROUPED = {"centre_ptr": None}
WIDE = dict.fromkeys(VELOCITIES, "*fp32")
LEAST = {"v_old_ptr": None, "v_ref_ptr": None, "weight_ptr": None}
ONE_ELEMENT = {"numel": 1, "tiles": 1}  # Triton makes constants of integers that are 1

CASES = [
    ("nft", nft_loss._forward_kernel, SIGNATURE, EVERY),
    ("nft fp32", nft_loss._forward_kernel, SIGNATURE | WIDE, (90,)),
    ("nft least", nft_loss._forward_kernel, SIGNATURE | LEAST, (90,)),
    ("nft one element", nft_loss._forward_kernel, SIGNATURE | ONE_ELEMENT, (90,)),
    ("crd", crd_loss._forward_kernel, SIGNATURE | GROUPED, EVERY),
    ("crd fp32", crd_loss._forward_kernel, SIGNATURE | GROUPED | WIDE, (90,)),
    ("crd least", crd_loss._forward_kernel, SIGNATURE | LEAST | {"groups_ptr": None, "ADAPTIVE": False}, (90,)),
    ("crd one element", crd_loss._forward_kernel, SIGNATURE | GROUPED | ONE_ELEMENT, (90,)),
    ("backward", nft_loss._backward_kernel, SIGNATURE, EVERY),
    ("backward fp32", nft_loss._backward_kernel, SIGNATURE | WIDE, (90,)),
    ("backward least", nft_loss._backward_kernel, SIGNATURE | LEAST, (90,)),
]

if __name__ == "__main__":
    for name, kernel, signature, archs in CASES:
        for arch in archs:
            show(name, arch, report(kernel, signature, arch, num_warps=nft_loss.NUM_WARPS))
