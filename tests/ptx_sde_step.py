"""Compiles the kernels of `sde_step` and `seeded_noise` for every architecture: `python tests/ptx_sde_step.py`."""

from typing import Any

import triton
from ptx import EVERY, report, show

from mtedit_fast.kernels import sde_step, seeded_noise

SIGNATURE = {"host_step": "i32", "step": "i32", "num_steps": "i32", "numel": "i64", "tiles": "i32", "BLOCK": 4096}
FORWARD = SIGNATURE | {"sample_ptr": "*fp32", "velocity_ptr": "*bf16", "table_ptr": "*fp32", "STEP": 0, "MODE": 1}
FORWARD |= {"step_ptr": None, "noise_ptr": None, "seed_ptr": None, "replayed_ptr": None, "mean_ptr": "*fp32"}
FORWARD |= {"out_ptr": "*fp32", "log_prob_ptr": "*fp32", "partial_ptr": "*fp32", "arrived_ptr": "*i32"}
FORWARD |= {"ROUND_BEFORE": True}
BACKWARD = FORWARD | {"grad_prev_ptr": None, "grad_log_prob_ptr": "*fp32", "grad_mean_ptr": "*fp32"}
BACKWARD |= {"grad_sample_ptr": None, "grad_velocity_ptr": "*bf16", "ROUNDED": triton.language.bfloat16}
SEEDED = {"seed_ptr": "*i64"}
REPLAYED = {"replayed_ptr": "*bf16", "out_ptr": None}
ONE_ELEMENT = {"numel": 1, "tiles": 1}  # Triton makes constants of integers that are 1

forward, backward, noise = sde_step._forward_kernel, sde_step._backward_kernel, seeded_noise._kernel
CASES: list[tuple[str, Any, dict[str, Any], tuple[int, ...]]] = [
    ("forward seed", forward, FORWARD | SEEDED, EVERY),
    ("forward seed bf16 squared", forward, FORWARD | SEEDED | {"out_ptr": "*bf16", "MODE": 2, "STEP": 2}, (90,)),
    ("forward noise", forward, FORWARD | {"noise_ptr": "*bf16", "STEP": 1, "step_ptr": "*i64"}, (90,)),
    ("forward replay", forward, FORWARD | REPLAYED | {"mean_ptr": None}, EVERY),
    ("forward one element", forward, FORWARD | SEEDED | ONE_ELEMENT, (90,)),
    ("backward replay", backward, BACKWARD | REPLAYED, EVERY),
    (
        "backward seed",
        backward,
        BACKWARD | SEEDED | {"grad_sample_ptr": "*fp32", "grad_prev_ptr": "*fp32"},
        EVERY,
    ),
    ("backward one element", backward, BACKWARD | REPLAYED | ONE_ELEMENT, (90,)),
    ("noise", noise, SIGNATURE | SEEDED | {"out_ptr": "*fp32"}, EVERY),
    ("noise fp16", noise, SIGNATURE | SEEDED | {"out_ptr": "*fp16"}, (90,)),
]
for _, _, signature, _ in CASES:
    if signature.get("STEP") == 2:
        signature["step_ptr"] = "*i64"

if __name__ == "__main__":
    for name, kernel, signature, archs in CASES:
        for arch in archs:
            drawn = signature["BLOCK"] // 32 // seeded_noise.DRAWING_WARPS if signature["seed_ptr"] else 0
            warps = seeded_noise.DRAWING_WARPS if drawn else seeded_noise.NUM_WARPS
            show(name, arch, report(kernel, signature, arch, num_warps=warps) | {"drawn": drawn})
