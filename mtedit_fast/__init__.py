"""Fast reinforcement learning of multi-turn image editors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtedit_fast.dropins.flow_grpo import sde_step_with_logprob as sde_step_with_logprob
    from mtedit_fast.sampling.scheduler import FlowMatchSDEScheduler as FlowMatchSDEScheduler

__version__ = "0.1.0"
__all__ = ["FlowMatchSDEScheduler", "__version__", "sde_step_with_logprob"]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import; `mtedit-fast --help` and config checks need neither
    if name == "sde_step_with_logprob":
        from mtedit_fast.dropins.flow_grpo import sde_step_with_logprob

        return sde_step_with_logprob
    if name == "FlowMatchSDEScheduler":
        from mtedit_fast.sampling.scheduler import FlowMatchSDEScheduler

        return FlowMatchSDEScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
