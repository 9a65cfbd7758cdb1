"""EdiVal: what a multi-turn edit kept and what it changed."""

from .consistency import Consistency, ContentConsistency

__all__ = ["Consistency", "ContentConsistency"]
