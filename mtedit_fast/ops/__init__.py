"""Fused operators: one file per op, each with its plain-PyTorch reference."""

from mtedit_fast.ops.coefficients import SDECoefficients, sde_coefficients
from mtedit_fast.ops.sde_step import SDEStepOutput, sde_step
from mtedit_fast.ops.seeded_noise import seeded_noise

__all__ = ["SDECoefficients", "SDEStepOutput", "sde_coefficients", "sde_step", "seeded_noise"]
