"""Compiles the kernels of the ops on an lm_head for every architecture: `python tests/ptx_digit_score.py`."""

from typing import Any

from ptx import EVERY, report, show

from mtedit_fast.kernels import digit_score, linear_logsumexp, token_log_probs
from mtedit_fast.kernels.linear_logsumexp import NUM_WARPS

FP32 = ("values_ptr", "picked_ptr", "partial_ptr", "log_prob_ptr", "lse_ptr", "entropy_ptr", "statistics_ptr")
INTEGERS = ("count", "total", "tokens", "vocab_size", "width", "weight_stride", "tiles")
SIGNATURE: dict[str, Any] = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys((*FP32, "logits_ptr"), "*fp32")
SIGNATURE |= {"target_ptr": "*i64", "ids_ptr": "*i64", "scale": "fp32"}
INPUTS = ("hidden_ptr", "weight_ptr", "bias_ptr")
DIVISIBLE = ("width", "weight_stride")  # as in every model

PARTIAL = SIGNATURE | {"GROUP": linear_logsumexp.GROUP, "bias_ptr": None, "EVEN": True}
TARGETS = {"ENTROPY": True}
NO_TARGETS = {"ENTROPY": False, "target_ptr": None, "picked_ptr": None}
ODD = {"EVEN": False, "bias_ptr": "*bf16"}
ONES = dict.fromkeys(("total", "tokens", "vocab_size", "width", "weight_stride", "tiles"), 1)  # are made constants
HALF, SINGLE = linear_logsumexp.TILES["half"], linear_logsumexp.TILES["fp32"]
SCORE = SIGNATURE | digit_score.blocks(10, 4096)
MERGED = SIGNATURE | linear_logsumexp.MERGE

partial, score, merge = linear_logsumexp._partial_kernel, digit_score._score_kernel, token_log_probs._merge_kernel
CASES: list[tuple[str, Any, dict[str, Any], str, int, tuple[int, ...]]] = [
    ("partial", partial, PARTIAL | NO_TARGETS | HALF, "*bf16", NUM_WARPS, EVERY),
    ("partial targets", partial, PARTIAL | TARGETS | HALF, "*bf16", NUM_WARPS, EVERY),
    ("partial odd", partial, PARTIAL | TARGETS | HALF | ODD, "*bf16", NUM_WARPS, (90,)),
    ("partial ones", partial, PARTIAL | TARGETS | HALF | ODD | ONES, "*bf16", NUM_WARPS, (90,)),
    ("partial fp16", partial, PARTIAL | NO_TARGETS | HALF, "*fp16", NUM_WARPS, (90,)),
    ("partial fp32", partial, PARTIAL | TARGETS | SINGLE, "*fp32", NUM_WARPS, EVERY),
    ("score set", score, SCORE | {"partial_ptr": None, "bias_ptr": None}, "*bf16", NUM_WARPS, EVERY),
    ("score vocab", score, SCORE, "*bf16", NUM_WARPS, EVERY),
    ("score fp32", score, SCORE, "*fp32", NUM_WARPS, (90,)),
    ("score two", score, SCORE | digit_score.blocks(2, 2560), "*bf16", NUM_WARPS, (90,)),
    ("score many", score, SCORE | digit_score.blocks(256, 4096), "*bf16", NUM_WARPS, (90,)),
    ("score ones", score, SCORE | ONES | digit_score.blocks(1, 1), "*bf16", NUM_WARPS, (90,)),
    ("merge ones", merge, MERGED | ONES | {"ENTROPY": False}, "*bf16", token_log_probs.NUM_WARPS, (90,)),
    ("merge", merge, MERGED | {"ENTROPY": True}, "*bf16", token_log_probs.NUM_WARPS, EVERY),
]


def main() -> None:
    for name, kernel, signature, dtype, num_warps, archs in CASES:
        inputs = {key: dtype for key in INPUTS if signature.get(key, "") is not None}
        options = {"num_warps": num_warps, "num_stages": linear_logsumexp.STAGES, "divisible": DIVISIBLE}
        for arch in archs:
            show(name, arch, report(kernel, signature | inputs, arch, **options))


if __name__ == "__main__":
    main()
