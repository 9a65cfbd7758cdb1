"""The judge end to end: trajectories scored per second, against one generation per score.

mtedit-fast bench judge                 the playground's judge, G = 16, one and three turns
mtedit-fast bench judge --full          a Qwen3-VL-8B with random weights and images of 512 pixels, for a GPU
pytest benchmarks/bench_judge.py --benchmark-only

Three ways to the same scores, on edits as the decoder leaves them: ours; ours without sharing the prefix of a group;
and one `generate` call of one token for every score, its images through PIL and the stock processor. `difference` is
the largest distance between the first and the last.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from random import Random
from typing import Any

import command
import harness
import record
import torch
import torch.nn.functional as F
from peers.judge_loop import JudgeLoop, to_pil
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mtedit_fast.judge import HuggingFaceJudge, ImageSpec, JudgePrompt
from mtedit_fast.judge.sequence import encode, score_token_ids
from mtedit_fast.ops import digit_score
from mtedit_fast.training.playground.instructions import sample_chains
from mtedit_fast.training.playground.judge_model import IMAGES, PLAYGROUND_PROMPT, SPECIAL, load_judge_parts
from mtedit_fast.training.playground.world import CELLS, render

ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of a scale of 4: batches of another shape round differently


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file. Times are microseconds of a whole call."""

    prompt_tokens: int
    """Of one trajectory's question, images included."""
    median_us: float
    p20_us: float
    p80_us: float
    trajectories_per_s: float
    unshared_us: float
    speedup_prefix: float
    """What sharing the prefix alone brings."""
    one_by_one_us: float
    speedup_one_by_one: float
    head_us: float
    percent_head: float
    """The score head's share of our time."""
    difference: float


@dataclass(frozen=True)
class Case:
    """`group` trajectories of `turns` edits of one image."""

    full: bool
    device: torch.device
    group: int = 16
    turns: int = 3

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.full and self.device.type == "cuda" else torch.float32

    @property
    def shape(self) -> str:
        return f"{self.group}x{self.turns}x{self.images[1].shape[-1]}"

    @property
    def prompt(self) -> JudgePrompt:
        return JudgePrompt() if self.full else PLAYGROUND_PROMPT

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec() if self.full else IMAGES

    @property
    def parts(self) -> tuple[Any, Any]:
        """(model, tokenizer)"""
        return parts(self.full, self.device, self.dtype)

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """A reference [1, 3, H, W] and edits [B, K, 3, H, W]: the scenes of a chain, noisy, of 8 bits."""
        generator = torch.Generator().manual_seed(0)
        scenes = self.chain.scenes[0]
        pictures = render(scenes[:, :CELLS], scenes[:, CELLS])
        if self.full:
            pictures = F.interpolate(pictures, 512, mode="nearest")
        noise = torch.randn(self.group, *pictures[1:].shape, generator=generator)
        edits = (pictures[1:] + 0.05 * noise).clamp(0, 1)
        reference, edits = (((255 * x).round() / 255).to(self.device) for x in (pictures[:1], edits))
        return reference, edits

    @cached_property
    def chain(self) -> Any:
        return sample_chains(Random(0), 1, self.turns)

    @property
    def instructions(self) -> list[list[str]]:
        return self.chain.instructions * self.group

    @property
    def tokens(self) -> list[int]:
        return [self.spec.tokens(*self.images[0].shape[-2:])] * (self.turns + 1)


@lru_cache(maxsize=1)  # cases of one run differ in their turns: the large model is built once
def parts(full: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer); the full-size model has random weights, and the playground's tokenizer."""
    model, tokenizer = load_judge_parts()
    if full:
        names = ("image", "video", "vision_start", "vision_end")
        special = {f"{name}_token_id": getattr(model.config, f"{name}_token_id") for name in names}
        with torch.device(device):
            torch.set_default_dtype(dtype)
            model = Qwen3VLForConditionalGeneration(qwen3_vl_8b(**special)).eval()
            torch.set_default_dtype(torch.float32)
    assert all(token in tokenizer.get_vocab() for token in SPECIAL)
    return model.to(device), tokenizer


def qwen3_vl_8b(**special: int) -> Qwen3VLConfig:
    """The sizes of Qwen3-VL-8B-Instruct."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={"out_hidden_size": 4096},
        tie_word_embeddings=False,
        **special,
    )


def judge(case: Case, share_prefix: bool = True) -> Callable[[], Tensor]:
    model, tokenizer = case.parts
    own = HuggingFaceJudge(model, tokenizer, case.spec, case.prompt, share_prefix=share_prefix)
    references, edits = case.images
    owner = [0] * case.group
    return lambda: own.score(references, edits, case.instructions, owner=owner).score.cpu()


def one_by_one(case: Case) -> Callable[[], Tensor]:
    """A `generate` call per score (peers/judge_loop.py), the images converted for each."""
    loop = JudgeLoop(*case.parts, case.spec, case.prompt)
    references, edits = case.images

    def score(chain: Tensor, texts: list[str], opening: str) -> float:
        return loop.score([to_pil(references[0]), *map(to_pil, chain)], texts, opening)

    def run() -> Tensor:
        openings = case.prompt.openings(case.turns)
        return torch.tensor(
            [
                [score(chain, texts, opening) for opening in openings]
                for chain, texts in zip(edits, case.instructions, strict=True)
            ]
        )

    return run


def head(case: Case) -> Callable[[], Tensor]:
    """The score head alone, for as many scores."""
    model, tokenizer = case.parts
    weight = model.get_output_embeddings().weight.detach()
    hidden = torch.randn(case.group * case.turns, weight.shape[1], device=case.device).to(weight.dtype)
    scale = case.prompt.answers
    ids = score_token_ids(tokenizer, scale, case.prompt.openings(1)[0])
    return lambda: digit_score(hidden, weight, ids, scale.values).score.cpu()


IMPLEMENTATIONS: dict[str, Callable[[Case], Callable[[], Tensor]]] = {
    "ours": judge,
    "unshared": lambda case: judge(case, share_prefix=False),
    "one by one": one_by_one,
    "head": head,
}


def bench(case: Case, min_seconds: float) -> Row:
    """Raises RuntimeError where ours and one by one do not score alike, so that times mean nothing."""
    calls = {name: make(case) for name, make in IMPLEMENTATIONS.items()}
    difference = (calls["ours"]() - calls["one by one"]()).abs().max().item()
    if not difference <= ALLOWED[case.dtype]:
        raise RuntimeError(f"{case}: scores differ by {difference:.3g}, {ALLOWED[case.dtype]} is allowed: no row")
    # each call ends on the host, so that a GPU is timed like a CPU
    peers = {name: [call] for name, call in calls.items()}
    samples = harness.host_samples(case.device)
    times = harness.measure(peers, torch.device("cpu"), min_seconds=min_seconds, samples=samples)
    own = times["ours"]
    model, tokenizer = case.parts
    token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    question, _ = encode(tokenizer, case.prompt, case.instructions[0], case.tokens, image_token=token)
    return Row(
        **columns(case),
        prompt_tokens=len(question),
        median_us=own.median,
        p20_us=own.p20,
        p80_us=own.p80,
        trajectories_per_s=round(1e6 * case.group / own.median, 1),
        unshared_us=times["unshared"].median,
        speedup_prefix=round(times["unshared"].median / own.median, 2),
        one_by_one_us=times["one by one"].median,
        speedup_one_by_one=round(times["one by one"].median / own.median, 2),
        head_us=times["head"].median,
        percent_head=round(100 * times["head"].median / own.median, 2),
        difference=float(f"{difference:.2g}"),
    )


def columns(case: Case) -> dict[str, Any]:
    return record.environment(case.device) | {
        "op": "judge",
        "variant": "qwen3-vl-8b" if case.full else "playground",
        "shape": case.shape,
        "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype],
        "backend": "auto",
        "timing": "call",
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(min_seconds=1.0)
    parser.add_argument("--full", action="store_true", help="Qwen3-VL-8B with random weights, images of 512")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 3])


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    for turns in args.turns:
        case = Case(args.full, args.device, args.group, turns)
        yield command.Job(columns(case), partial(bench, case, args.min_seconds))


def describe(row: Row) -> str:
    return (
        f"{row.variant} {row.shape} {row.dtype}: {row.trajectories_per_s} trajectories/s; prefix sharing "
        f"{row.speedup_prefix}x, one by one {row.speedup_one_by_one}x, head {row.percent_head} % of the time, "
        f"scores differ by {row.difference}"
    )


def prepare(implementation: str) -> tuple[str, harness.Call]:
    case = Case(False, command.default_device(), group=4)
    assert (judge(case)() - one_by_one(case)()).abs().max() <= ALLOWED[case.dtype]
    return "judge, 4 x 3 turns", IMPLEMENTATIONS[implementation](case)


main = partial(command.run, __doc__, "judge", options, jobs, describe)
test_judge = command.speed_test(prepare, [(name,) for name in IMPLEMENTATIONS])

if __name__ == "__main__":
    main()
