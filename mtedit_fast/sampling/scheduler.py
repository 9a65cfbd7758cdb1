"""A diffusers flow-matching scheduler whose step is stochastic and has a log-probability."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

# diffusers looks here for the base class when it loads a pipeline that was saved with this scheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mtedit_fast.ops import SDECoefficients, SDEStepOutput, sde_coefficients, sde_step
from mtedit_fast.sampling.sigmas import host_values, nearest_index

NoiseSource = Tensor | torch.Generator | list[torch.Generator] | None


class TrajectoryStep(NamedTuple):
    """One recorded step, detached, in the pipeline's dtype."""

    step: int
    """Index in the schedule."""
    sample: Tensor
    """[B, ...] before the step."""
    prev_sample: Tensor
    """[B, ...] after it."""
    log_prob: Tensor | None
    """[B] fp32; None for an ODE step."""


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    prev_sample: Tensor
    log_prob: Tensor | None = None
    mean: Tensor | None = None


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """``FlowMatchEulerDiscreteScheduler`` with SDE steps, for any pipeline that takes the stock one.

    ``FlowMatchSDEScheduler.from_config(pipe.scheduler.config, eta=0.9)`` keeps the schedule of the stock scheduler.
    The step computes in fp32, returns the next sample in the dtype of the incoming one and takes the log-prob on that
    rounded value, so that a replay reproduces it. It never waits for the device, given ``set_begin_index`` (as stock
    pipelines do) and noise that is drawn there, not by a ``torch.Generator`` of the CPU. A velocity that is not finite
    shows in :meth:`raise_if_nan`, to be called after the loop.

    Args:
        variant: sampler, see :func:`mtedit_fast.ops.sde_coefficients`.
        eta: noise level; 0 gives the stock scheduler's samples.
        sde_steps: indices of the stochastic steps, for instance an :func:`mtedit_fast.sampling.sde_window`; None is
            every step but the last, which is always an ODE step.
        check: raise at the step whose velocity is not finite; waits for the device at every step.

    The other arguments are the stock scheduler's.

    Raises:
        ValueError: an unknown variant, ``eta < 0``, ``invert_sigmas`` or ``stochastic_sampling``.
    """

    sigmas: Tensor  # [T+1] fp32
    timesteps: Tensor  # [T] fp32

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        variant: str = "sde",
        eta: float = 0.7,
        sde_steps: list[int] | None = None,
        check: bool = False,
    ) -> None:
        if invert_sigmas or stochastic_sampling:
            name = "invert_sigmas" if invert_sigmas else "stochastic_sampling"
            raise ValueError(f"{name}=True has no SDE with a log-prob here: set it to False")
        sde_coefficients([1.0, 0.5, 0.0], variant=variant, eta=eta)  # a bad variant or eta raises here, not in a run
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
        )
        self.coefficients: SDECoefficients | None = None
        self._noise_source: NoiseSource = None
        self._recording = False
        self._trajectory: list[TrajectoryStep] = []
        self._finite: list[tuple[int, Tensor]] = []

    @property
    def trajectory(self) -> list[TrajectoryStep]:
        """The steps since the last ``set_timesteps`` or :meth:`start_recording`."""
        if not self._recording:
            raise RuntimeError("nothing is recorded: call scheduler.start_recording() before the pipeline")
        return self._trajectory

    def start_recording(self) -> None:
        """Keep every step from here on; each ``set_timesteps``, so each pipeline call, begins a new trajectory."""
        self._recording, self._trajectory = True, []

    def stop_recording(self) -> None:
        """Stop and let go of the recorded trajectory."""
        self._recording, self._trajectory = False, []

    def set_noise_source(self, source: NoiseSource) -> None:
        """Where the steps' noise comes from.

        Args:
            source: int64 ``[B]`` seeds, one per sample (counter-based: a sample's noise depends on its seed and the
                step alone, not on its batch); a ``torch.Generator``, or a list of one per sample; None for torch's
                global generator.
        """
        if isinstance(source, Tensor) and (source.dtype != torch.int64 or source.ndim != 1):
            raise TypeError(f"seeds must be an int64 tensor [B], got {source.dtype} of shape {tuple(source.shape)}")
        self._noise_source = source

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The stock schedule, and its step coefficients on ``device``; begins a new trajectory.

        Raises:
            ValueError: ``sde_steps`` outside the schedule or naming its last step, sigmas that do not decrease.
        """
        self.coefficients = None
        # made on the host, where the sigmas can be checked without waiting for the device
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        config: Any = self.config
        host_sigmas, host_timesteps = self.sigmas, self.timesteps
        last = len(host_timesteps) - 1
        steps: Sequence[int] = range(last) if config.sde_steps is None else config.sde_steps
        if last in steps:
            raise ValueError(f"sde_steps must not hold the last step, {last}: it is always an ODE step")
        # a table made under inference_mode could not serve a later replay with gradients
        with torch.inference_mode(False):
            coefficients = sde_coefficients(
                host_sigmas.tolist(), variant=config.variant, eta=config.eta, sde_steps=steps
            )
            self.coefficients = coefficients._replace(table=coefficients.table.to(device or "cpu"))
        self.sigmas = host_sigmas.to(device or "cpu")
        self.timesteps = host_timesteps.to(device or "cpu")
        self._trajectory, self._finite = [], []

    def index_for_timestep(
        self,
        timestep: float | Tensor,
        schedule_timesteps: Tensor | None = None,
    ) -> int:
        """Position of ``timestep`` in the schedule; ValueError with the nearest ones if it is not there."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return nearest_index(float(timestep), host_values(schedule))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple[Tensor, Tensor | None, Tensor]:
        """One step of the schedule; counts on the host.

        Args:
            model_output: velocity ``[B, ...]``, fp32, bf16 or fp16.
            timestep: an element of ``self.timesteps``; read at the first step only, and only without
                ``set_begin_index``.
            sample: x_t, same shape; its dtype is the dtype of the next sample.
            generator: for this step, in place of the noise source.
            return_dict: False returns ``(prev_sample, log_prob, mean)``.

        Returns:
            prev_sample, log_prob fp32 ``[B]`` (None for an ODE step), mean fp32.

        Raises:
            TypeError: an integer timestep. ValueError: no schedule or a finished one, shapes that do not fit, a
                timestep outside the schedule, and with ``check`` a velocity that is not finite.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise TypeError("timestep must be an element of scheduler.timesteps, a float, not an integer index")
        coefficients = self._scheduled()
        if self.step_index is None:
            self._init_step_index(timestep)
        index: int = self.step_index
        if index >= len(coefficients.stochastic):
            raise ValueError(f"all {index} steps of the schedule are done: call scheduler.set_timesteps(...) again")

        noise, seed = None, None
        if coefficients.stochastic[index]:
            source = self._noise_source if generator is None else generator
            if isinstance(source, Tensor):
                seed = source.to(sample.device, non_blocking=True)
            else:
                noise = randn_tensor(sample.shape, generator=source, device=sample.device, dtype=torch.float32)
        out = sde_step(sample, model_output, coefficients, index, noise=noise, seed=seed)

        shown = out.prev_sample.detach().flatten(1) if out.log_prob is None else out.log_prob.detach()[:, None]
        self._finite.append((index, shown.isfinite().all(dim=1)))
        if self.config.check:
            self.raise_if_nan()
        if self._recording:
            log_prob = None if out.log_prob is None else out.log_prob.detach()
            self._trajectory.append(TrajectoryStep(index, sample.detach(), out.prev_sample.detach(), log_prob))
        self._step_index = index + 1
        if not return_dict:
            return out.prev_sample, out.log_prob, out.mean
        return FlowMatchSDESchedulerOutput(out.prev_sample, out.log_prob, out.mean)

    def replay(self, model_output: Tensor, index: int | Tensor, sample: Tensor, prev_sample: Tensor) -> SDEStepOutput:
        """Log-prob and mean of a stored step under a new velocity, with gradients; the step counter does not move.

        Args:
            model_output, sample, prev_sample: ``[B, ...]``.
            index: the step, a host int or int64 ``[B]`` on the device (several steps in one batch).
        """
        return sde_step(sample, model_output, self._scheduled(), index, prev_sample=prev_sample)

    def raise_if_nan(self) -> None:
        """ValueError naming each step and sample not finite since ``set_timesteps``; waits for the device."""
        bad = [(i, (~finite).nonzero().flatten().tolist()) for i, finite in self._finite]
        found = "; ".join(f"step {i}: samples {samples}" for i, samples in bad if samples)
        if found:
            raise ValueError(f"velocity or sample was not finite at {found}; check the model's output")

    def _scheduled(self) -> SDECoefficients:
        if self.coefficients is None:
            raise ValueError("the scheduler has no schedule: call scheduler.set_timesteps(...) first")
        return self.coefficients
