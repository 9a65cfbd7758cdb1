"""Diffusion latent beam search with lookahead on the multi-turn rollout (after Oshima et al., "Inference-time
text-to-video alignment with diffusion latent beam search", 2025).

A turn's noise is numbered as `seeded_noise` numbers it: 0 is what the turn starts from, i + 1 what step i adds. At the
chosen numbers every beam takes `branching` different draws; the clean image that each of them points to is decoded and
scored, and the best `width` go on, over the turns of a chain as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mtedit_fast.editors.base import Condition, Editor, TextConditioning
from mtedit_fast.inference_time.candidates import Reward, rank, reward_name, score
from mtedit_fast.ops import SDECoefficients, sde_coefficients, sde_step, seeded_noise
from mtedit_fast.rewards import RewardBatch
from mtedit_fast.rollout import encode_reference, sample_seeds, turn_seeds
from mtedit_fast.sampling.multistep import dpm2m_coefficients, dpm2m_step
from mtedit_fast.trajectories import RolloutConfig, slices

__all__ = ["BeamResult", "Cost", "beam_search", "default_branches"]

_BRANCH = 0xD1342543DE82EF95  # odd: its powers spread the draws of a beam over the Philox keys


@dataclass
class Cost:
    """What a search took: transformer `calls`, the `rows` in them (both branches of guidance count), `scored` images
    that the reward saw as candidates, each with its own history."""

    calls: int = 0
    rows: int = 0
    scored: int = 0


@dataclass(frozen=True)
class BeamResult:
    """The W beams of B images over K turns, best first.

    Attributes:
        images: [B, W, K, 3, H, W] fp32 in [0, 1], rounded to 8 bit.
        scores: [B, W, K] fp32, the reward of the finished chains; a beam is as good as its mean over the turns.
        cost: of the whole batch.
        undefined: [B] int64, candidates that lost because their score was NaN.
    """

    images: Tensor
    scores: Tensor
    cost: Cost
    undefined: Tensor

    @property
    def best(self) -> Tensor:
        """[B, K, 3, H, W]."""
        return self.images[:, 0]


def default_branches(num_steps: int, stochastic: Sequence[int] | None = None) -> tuple[int, ...]:
    """Noise numbers to branch at: after a sixth and a third of the steps, while an edit's layout is still open.

    Of the `stochastic` steps (None: all but the last) where they hold these; else the last noise that is drawn.
    """
    drawn = [0, *(step + 1 for step in (range(num_steps - 1) if stochastic is None else stochastic))]
    wanted = sorted({max(1, num_steps // 6), max(1, num_steps // 3)})
    return tuple(number for number in wanted if number in drawn) or (drawn[-1],)


@torch.no_grad()
def beam_search(
    editor: Editor,
    images: Tensor,
    instructions: list[list[str]],
    reward: Reward,
    *,
    width: int,
    branching: int,
    lookahead: int,
    num_steps: int,
    branch_at: Sequence[int] | None = None,
    variant: str = "sde",
    eta: float = 0.7,
    window: tuple[int, int] | None = None,
    guidance_scale: float = 3.5,
    reference_size: tuple[int, int] | None = None,
    seeds: Tensor | None = None,
    micro_batch: int = 32,
) -> BeamResult:
    """Edit B images over K turns and keep the `width` chains whose reward is highest.

    A beam that has not branched yet is computed once for all that it stands for; its first branching makes
    width·branching candidates, every other one `branching` of each beam. The velocities that a lookahead has computed
    serve the beams that survive it as far as their steps are deterministic. width = branching = 1 is `rollout` with
    one member per group, bit for bit; width = n, branching = 1 and branch_at = (0,) is best of n.

    Noise depends on an image's seed and on the draws a beam descends from, not on width: as long as the beams of a
    narrow search survive in a wider one, their candidates are among the wider one's. The first draw of the first beam
    is that of the plain rollout.

    Args:
        editor: of any family.
        images: [B, 3, H, W] in [0, 1].
        instructions: B lists of K texts.
        reward: see `Reward`; candidates are ranked by its mean over the turns so far.
        width: beams kept per image.
        branching: draws per beam; width·branching candidates are scored at a time. 1 branches once, without a choice
            before the end.
        lookahead: deterministic steps from a candidate to the state whose clean estimate x − σv is judged; 0 judges
            that of the candidate itself, `num_steps` the image that the ODE would finish with.
        num_steps, variant, eta, window, guidance_scale, reference_size, micro_batch: as in `RolloutConfig`.
        branch_at: noise numbers, 0 for the starting noise and i + 1 for stochastic step i. None: `default_branches`.
        seeds: int64 [B], one per image. None: `sample_seeds(0, 0, B)`.

    Returns:
        BeamResult. An image none of whose candidates got a score goes on with its first ones, and a warning names it.

    Raises:
        TypeError: a reward that is no function, or returns no numbers.
        ValueError: shapes or numbers that do not fit, a reward of another shape than [n, k], or one that is NaN for
            every candidate of every image.
    """
    config = RolloutConfig(
        group_size=1,
        num_steps=num_steps,
        variant=variant,
        eta=eta,
        window=window,
        micro_batch=micro_batch,
        guidance_scale=guidance_scale,
        reference_size=reference_size,
    )
    _check(images, instructions, reward, width, branching, lookahead, config, branch_at, seeds)
    branch_at = default_branches(num_steps, config.sde_steps()) if branch_at is None else branch_at
    seeds = sample_seeds(0, 0, len(images)) if seeds is None else seeds
    search = _Search(
        editor, images.to(editor.device), instructions, reward, width, branching, lookahead, config, branch_at
    )
    chains = search.images.new_empty(len(images), 0, *images.shape[1:])  # [beams, turns so far, 3, H, W]
    keys = seeds.to(editor.device)
    for turn in range(len(instructions[0])):
        chains, keys = search.turn(turn, chains, keys)
    return search.finish(chains)


@dataclass
class _Beams:
    """n beams, image by image and equally many of each."""

    keys: Tensor  # [n] int64
    parent: Tensor  # [n] int64 on the host: the chain whose last image the beam edits
    latents: Tensor  # [n, N, C]
    ahead: list[Tensor] = field(default_factory=list)  # velocities known already, at this state and those after it
    previous: Tensor | None = None  # clean estimate of the step before, for the multistep solver

    def take(self, rows: Tensor) -> _Beams:
        """Beams at the host's indices `rows`, which may repeat."""
        at = rows.to(self.latents.device)
        return _Beams(
            self.keys[at],
            self.parent[rows],
            self.latents[at],
            [velocity[at] for velocity in self.ahead],
            None if self.previous is None else self.previous[at],
        )


@dataclass
class _Search:
    """One call of `beam_search`; its arguments, the images on the editor's device."""

    editor: Editor
    images: Tensor
    instructions: list[list[str]]
    reward: Reward
    width: int
    branching: int
    lookahead: int
    config: RolloutConfig
    branch_at: Sequence[int]

    def __post_init__(self) -> None:
        editor, config, images = self.editor, self.config, self.images
        self.cost, self.undefined = Cost(), torch.zeros(len(images), dtype=torch.int64)
        self.unscored = torch.zeros(len(images), dtype=torch.bool)
        self.size = (images.shape[-2], images.shape[-1])
        self.shape = editor.latent_shape(*self.size)
        schedule = editor.schedule(config.num_steps, *self.size)
        self.sigmas, self.timesteps = schedule.sigmas.tolist(), schedule.timesteps
        stochastic = config.sde_steps()
        table = partial(sde_coefficients, schedule.sigmas.cpu(), eta=config.eta, device=editor.device)
        self.ode: SDECoefficients = table(variant="ode")
        self.steps = table(variant=config.variant, sde_steps=stochastic) if stochastic else self.ode
        self.solver = dpm2m_coefficients(self.sigmas) if config.variant == "dpm2m" else None
        self.text: TextConditioning = {}
        self.references = torch.empty(0)
        self.chains = torch.empty(0)
        self.conditions: dict[tuple[int, ...], Condition] = {}

    def turn(self, turn: int, chains: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """One more image for the beams of `chains` [n, turn, 3, H, W], and their keys."""
        self._encode(turn, chains)
        parents = torch.arange(len(keys))
        beams = _Beams(keys, parents, torch.empty(len(keys), *self.shape, device=keys.device))
        for number in range(self.config.num_steps + 1):  # of the noise; afterwards the beams are at sigmas[number]
            if number:
                velocity = self._velocity_of(beams, number - 1)
                beams.ahead[:1] = [velocity]
            branches = number in self.branch_at
            if branches:
                beams = self._branch(beams, turn, number)
            beams = self._draw(beams, turn, number)
            if branches and len(beams.keys) > self.width * len(self.images):
                beams = self._select(beams, turn, number)
        finished = self._decode(beams.latents)
        return torch.cat([chains[beams.parent.to(chains.device)], finished[:, None]], dim=1), beams.keys

    def finish(self, chains: Tensor) -> BeamResult:
        scores = self._score(chains)
        order = self._order(scores)
        batch, turns = len(self.images), chains.shape[1]
        if self.unscored.any():
            warnings.warn(
                f"reward {reward_name(self.reward)}: NaN for every candidate of images "
                f"{self.unscored.nonzero().flatten().tolist()}, which were edited without a choice",
                stacklevel=4,
            )
        return BeamResult(
            chains[order.to(chains.device)].view(batch, -1, *chains.shape[1:]),
            scores[order].view(batch, -1, turns),
            self.cost,
            self.undefined,
        )

    def _encode(self, turn: int, chains: Tensor) -> None:
        """References and text of the images that this turn edits: each once."""
        editor, rows = self.editor, len(chains)
        self.chains, self.conditions = chains, {}
        edited = chains[:, -1] if turn else self.images
        parts = slices(rows, self.config.micro_batch)
        self.references = torch.cat([encode_reference(editor, edited[part], self.config) for part in parts])
        prompts, per_image = [chain[turn] for chain in self.instructions], rows // len(self.images)
        if editor.text_sees_image:
            repeated = [prompt for prompt in prompts for _ in range(per_image)]
            texts = [editor.encode_text(repeated[p], edited[p]) for p in slices(rows, self.config.micro_batch)]
            self.text = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        else:
            text = editor.encode_text(prompts)
            self.text = {name: value.repeat_interleave(per_image, dim=0) for name, value in text.items()}

    def _branch(self, beams: _Beams, turn: int, number: int) -> _Beams:
        """Every beam as often as makes width·branching candidates of an image, each with a key of its own."""
        count = len(beams.keys)
        draws = self.width * self.branching * len(self.images) // count
        beams = beams.take(torch.arange(count).repeat_interleave(draws))
        power = pow(_BRANCH, turn * (self.config.num_steps + 1) + number + 1, 1 << 64)
        offset = torch.tensor(power - (1 << 64) if power >> 63 else power, device=beams.keys.device)
        beams.keys = beams.keys + torch.arange(draws, device=beams.keys.device).repeat(count) * offset  # modulo 2⁶⁴
        return beams

    def _draw(self, beams: _Beams, turn: int, number: int) -> _Beams:
        """The state after noise `number`: the start of the turn, or one step of the sampler."""
        keys = turn_seeds(beams.keys, turn)
        if number == 0:
            return replace(beams, latents=seeded_noise(keys, self.shape, 0))
        step, velocity = number - 1, beams.ahead[0]
        if self.solver is not None:
            estimate = beams.latents - self.sigmas[step] * velocity.float()
            latents = dpm2m_step(beams.latents, velocity, beams.previous, self.solver[step])
            return replace(beams, latents=latents, ahead=[], previous=estimate)
        latents = sde_step(beams.latents, velocity, self.steps, step, seed=keys, return_mean=False).prev_sample
        walked = [] if self.steps.stochastic[step] else beams.ahead[1:]  # a lookahead went the same way
        return replace(beams, latents=latents, ahead=walked)

    def _velocity_of(self, beams: _Beams, step: int) -> Tensor:
        return beams.ahead[0] if beams.ahead else self._velocity(beams.latents, beams.parent, step)

    def _velocity(self, latents: Tensor, parent: Tensor, step: int) -> Tensor:
        """The editor's at `step`, in micro-batches; counted."""
        parts = []
        for rows in slices(len(latents), self.config.micro_batch):
            condition = self._condition(parent[rows])
            # Cloned: what a graph returned, its next replay writes over.
            parts.append(self.editor.velocity(latents[rows], self.timesteps[step], condition).clone())
            self.cost.calls += 1
            self.cost.rows += len(parts[-1]) * condition.branches
        return torch.cat(parts)

    def _condition(self, parent: Tensor) -> Condition:
        """That of beams which edit the last images of the chains `parent`; made once for the same ones."""
        key = tuple(parent.tolist())
        if key not in self.conditions:
            at = parent.to(self.references.device)
            self.conditions[key] = self.editor.condition(
                self.references[at],
                {name: value.index_select(0, at) for name, value in self.text.items()},
                height=self.size[0],
                width=self.size[1],
                guidance_scale=self.config.guidance_scale,
                reference_size=self.config.reference_size,
            )
        return self.conditions[key]

    def _select(self, beams: _Beams, turn: int, number: int) -> _Beams:
        """The best `width` beams of every image, by the clean images their states point to."""
        state, steps = beams.latents, self.config.num_steps
        walked: list[Tensor] = []
        for step in range(number, min(number + self.lookahead + 1, steps)):
            velocity = self._velocity(state, beams.parent, step)
            walked.append(velocity)
            if step < number + self.lookahead:
                state = sde_step(state, velocity, self.ode, step, return_mean=False).prev_sample
            else:
                state = state.float() - self.sigmas[step] * velocity.float()
        beams.ahead = walked if self.solver is None else walked[:1]
        edits = self._decode(state)[:, None]
        scores = self._score(torch.cat([self.chains[beams.parent.to(edits.device)], edits], dim=1))
        return beams.take(self._order(scores)[:, : self.width].flatten())

    def _decode(self, latents: Tensor) -> Tensor:
        """Images [n, 3, H, W], rounded to 8 bit."""
        parts = [
            self.editor.decode(latents[rows], *self.size) for rows in slices(len(latents), self.config.micro_batch)
        ]
        return (torch.cat(parts) * 255).round() / 255

    def _score(self, edits: Tensor) -> Tensor:
        """The reward of chains [n, k, 3, H, W], [n, k] fp32 on the host."""
        per_image, turns = len(edits) // len(self.images), edits.shape[1]
        texts = [chain[:turns] for chain in self.instructions for _ in range(per_image)]
        self.cost.scored += len(edits)
        return score(self.reward, RewardBatch(self.images.repeat_interleave(per_image, dim=0), edits, texts))

    def _order(self, scores: Tensor) -> Tensor:
        """Rows of the candidates of every image [B, n/B], best first."""
        total = scores.mean(1).view(len(self.images), -1)
        order = rank(total, self.reward)
        self.undefined += total.isnan().sum(1)
        self.unscored |= total.isnan().all(1)
        return order + torch.arange(len(total))[:, None] * total.shape[1]


def _check(
    images: Tensor,
    instructions: list[list[str]],
    reward: Reward,
    width: int,
    branching: int,
    lookahead: int,
    config: RolloutConfig,
    branch_at: Sequence[int] | None,
    seeds: Tensor | None,
) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected one tensor [B, 3, H, W] in [0, 1] with B >= 1, got {got}")
    turns = {len(chain) for chain in instructions}
    if len(instructions) != len(images) or len(turns) != 1 or turns == {0}:
        raise ValueError(
            f"instructions: expected {len(images)} lists of equally many texts (at least 1), one list per image, got "
            f"{len(instructions)} lists of {sorted(turns)}"
        )
    if not callable(reward):
        raise TypeError(f"reward: expected a function of RewardBatch, got {type(reward).__name__}")
    for name, value, least in (
        ("width", width, 1),
        ("branching", branching, 1),
        ("lookahead", lookahead, 0),
        ("num_steps", config.num_steps, 1),
        ("micro_batch", config.micro_batch, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected >= {least}, got {value}")
    drawn = [0, *(step + 1 for step in config.sde_steps())]
    if not set(branch_at or ()) <= set(drawn):
        raise ValueError(
            f"branch_at: expected among {drawn} (0 is the starting noise, i + 1 that of stochastic step i of "
            f"{config.num_steps} {config.variant} steps), got {list(branch_at or ())}"
        )
    if width * branching > 1 and branch_at is not None and not branch_at:
        raise ValueError(
            f"branch_at: expected at least one noise number, got none; without it {width}·{branching} candidates would "
            "all be the same"
        )
    if seeds is not None and (seeds.dtype != torch.int64 or seeds.shape != (len(images),)):
        raise ValueError(
            f"seeds: expected int64 [{len(images)}], one per image, got {seeds.dtype} {list(seeds.shape)}; "
            "see sample_seeds"
        )
