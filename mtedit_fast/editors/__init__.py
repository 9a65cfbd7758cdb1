"""Editor adapters, one file per model family."""

from mtedit_fast.editors.base import Editor, Schedule, TextConditioning, group_rows
from mtedit_fast.editors.kontext import KontextEditor

__all__ = ["Editor", "KontextEditor", "Schedule", "TextConditioning", "group_rows"]
