"""Fast reinforcement learning of multi-turn image editors."""

__version__ = "0.1.0"
