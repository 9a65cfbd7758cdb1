"""Qwen's vision-language models, which judge and condition editors: images prepared on the device, encoded once."""

from mtedit_fast.qwen_vl.images import ImageSpec, prepare_images
from mtedit_fast.qwen_vl.model import encode_images, hidden_states

__all__ = ["ImageSpec", "encode_images", "hidden_states", "prepare_images"]
