"""EdiVal: what a multi-turn edit kept and what it changed."""

from .backends import VLM, Detection, Detector, Quality, Question
from .benchmark import BenchmarkRow, RowError, read_benchmark, write_benchmark, write_chains
from .consistency import Consistency, ContentConsistency
from .grounding import GroundingDetector
from .instructions import TYPES, Instruction, instruct
from .objects import SceneObject, parse_objects
from .pools import Pools, generate
from .proposers import ListProposer, VLMProposer
from .vlm import HTTPVLM, VLMError

__all__ = [
    "HTTPVLM",
    "TYPES",
    "VLM",
    "BenchmarkRow",
    "Consistency",
    "ContentConsistency",
    "Detection",
    "Detector",
    "GroundingDetector",
    "Instruction",
    "ListProposer",
    "Pools",
    "Quality",
    "Question",
    "RowError",
    "SceneObject",
    "VLMError",
    "VLMProposer",
    "generate",
    "instruct",
    "parse_objects",
    "read_benchmark",
    "write_benchmark",
    "write_chains",
]
