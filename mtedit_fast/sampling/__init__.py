"""Schedules, SDE windows and the diffusers scheduler ``FlowMatchSDEScheduler``.

``scheduler`` needs diffusers and is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from mtedit_fast.sampling.sigmas import progressive_window, sde_window

if TYPE_CHECKING:
    from mtedit_fast.sampling.scheduler import FlowMatchSDEScheduler as FlowMatchSDEScheduler

__all__ = ["FlowMatchSDEScheduler", "progressive_window", "sde_window"]


def __getattr__(name: str) -> Any:
    if name == "FlowMatchSDEScheduler":
        from mtedit_fast.sampling.scheduler import FlowMatchSDEScheduler

        return FlowMatchSDEScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
