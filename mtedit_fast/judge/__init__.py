"""Judges: vision-language models that score edits by the expectation over their score tokens."""

from mtedit_fast.qwen_vl import ImageSpec, prepare_images

from .huggingface import HuggingFaceJudge
from .prompts import SCALES, JudgePrompt, Scale, parse_answer, write_answer
from .sampling import sample_answers
from .scores import Judge, JudgeScores
from .served import ServedJudge, ServedJudgeError

__all__ = [
    "SCALES",
    "HuggingFaceJudge",
    "ImageSpec",
    "Judge",
    "JudgePrompt",
    "JudgeScores",
    "Scale",
    "ServedJudge",
    "ServedJudgeError",
    "parse_answer",
    "prepare_images",
    "sample_answers",
    "write_answer",
]
