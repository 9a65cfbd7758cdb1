"""Fused operators: one file per op, each with its plain-PyTorch reference."""

from mtedit_fast.ops._crossover import vocab_backend
from mtedit_fast.ops.attention_columns import attention_columns
from mtedit_fast.ops.coefficients import SDECoefficients, sde_coefficients
from mtedit_fast.ops.crd_loss import CRDLoss, crd_loss
from mtedit_fast.ops.crop_resize import crop_resize
from mtedit_fast.ops.digit_score import DigitScore, digit_score
from mtedit_fast.ops.measure_crossover import measure_crossover
from mtedit_fast.ops.nft_loss import NFTLoss, advantage_to_reward, nft_loss
from mtedit_fast.ops.sde_step import SDEStepOutput, sde_step
from mtedit_fast.ops.seeded_noise import seeded_noise
from mtedit_fast.ops.token_log_probs import token_log_probs
from mtedit_fast.ops.token_similarity import token_similarity

__all__ = [
    "CRDLoss",
    "DigitScore",
    "NFTLoss",
    "SDECoefficients",
    "SDEStepOutput",
    "advantage_to_reward",
    "attention_columns",
    "crd_loss",
    "crop_resize",
    "digit_score",
    "measure_crossover",
    "nft_loss",
    "sde_coefficients",
    "sde_step",
    "seeded_noise",
    "token_log_probs",
    "token_similarity",
    "vocab_backend",
]
