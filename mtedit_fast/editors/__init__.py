"""Editor adapters, one file per model family."""

from typing import Any

from mtedit_fast.editors.base import Condition, Editor, Schedule, TextConditioning
from mtedit_fast.editors.klein import KleinEditor
from mtedit_fast.editors.klein_kv import KleinKVEditor
from mtedit_fast.editors.kontext import KontextEditor
from mtedit_fast.editors.qwen import QwenEditor

EDITORS: dict[str, Any] = {
    "kontext": KontextEditor,
    "qwen_image_edit": QwenEditor,
    "flux2_klein": KleinEditor,
    "flux2_klein_kv": KleinKVEditor,
}
"""Adapter class by family name, as in the configuration's model.family."""

__all__ = [
    "EDITORS",
    "Condition",
    "Editor",
    "KleinEditor",
    "KleinKVEditor",
    "KontextEditor",
    "QwenEditor",
    "Schedule",
    "TextConditioning",
]
