"""ONNX and TensorRT: trained editors, DINO backbones and one-step generators as graphs and engines."""

from mtedit_fast.export.compare import Result, compare
from mtedit_fast.export.editors import editor_modules, export_editor
from mtedit_fast.export.engine import build_engine
from mtedit_fast.export.lora import Lora, lora_inputs, merge_lora, read_lora
from mtedit_fast.export.manifest import Manifest
from mtedit_fast.export.modules import (
    Exportable,
    clip_text,
    dino,
    generator,
    klein_transformer,
    kontext_transformer,
    t5_text,
    vae_decoder,
    vae_encoder,
)
from mtedit_fast.export.onnx import export_onnx
from mtedit_fast.export.pipeline import EnginePipeline
from mtedit_fast.export.ports import Bucket, Port, Profile
from mtedit_fast.export.qwen import QwenTransformer, qwen_transformer
from mtedit_fast.export.runtime import ExportedModule, ExportedVAE, OnnxModule
from mtedit_fast.export.tensorrt import DeviceMemory, TensorRTModule
from mtedit_fast.export.write import export_module

__all__ = [
    "Bucket",
    "DeviceMemory",
    "EnginePipeline",
    "Exportable",
    "ExportedModule",
    "ExportedVAE",
    "Lora",
    "Manifest",
    "OnnxModule",
    "Port",
    "Profile",
    "QwenTransformer",
    "Result",
    "TensorRTModule",
    "build_engine",
    "clip_text",
    "compare",
    "dino",
    "editor_modules",
    "export_editor",
    "export_module",
    "export_onnx",
    "generator",
    "klein_transformer",
    "kontext_transformer",
    "lora_inputs",
    "merge_lora",
    "qwen_transformer",
    "read_lora",
    "t5_text",
    "vae_decoder",
    "vae_encoder",
]
