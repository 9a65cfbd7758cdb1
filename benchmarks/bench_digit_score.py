"""digit_score and token_log_probs against full logits, torch.compile of our reference, and fused cross-entropies.

mtedit-fast bench digit_score                      appends to benchmarks/results/digit_score.csv
pytest benchmarks/bench_digit_score.py --benchmark-only     the same calls under pytest-benchmark (make bench)

A shape is rows x H x vocabulary. On a GPU the crossover of library products and the fused kernel is measured first and
`ours` is what "auto" then takes; both are timed as well; there, fp32 of 1024 rows and more takes --dtype fp32. The
cross-entropies (torch's chunked one, Liger's and cut-cross-entropy where they are installed) are peers of the log-probs
only: none of them knows score tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import op_bench
import record
import torch
import torch.nn.functional as F
from torch import Tensor

from mtedit_fast.ops import digit_score, measure_crossover, token_log_probs, vocab_backend
from mtedit_fast.ops._backend import choose_backend, unavailable_reason
from mtedit_fast.ops._linear_softmax import log_sum_exp
from mtedit_fast.ops.digit_score import reference_statistics, set_logits

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Liger
except ImportError:
    Liger = None
try:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
except ImportError:
    cut_cross_entropy = None
chunked_cross_entropy = getattr(F, "linear_cross_entropy", None)

IDS, VALUES = list(range(15, 25)), list(range(10))
VARIANTS = ("set", "vocab", "vocab_backward", "log_probs", "log_probs_backward")
SHAPES = {
    "cpu": ((1, 512, 32_000), (256, 512, 32_000)),
    "cuda": tuple((n, 4096, 151_936) for n in (1, 16, 64, 256, 1024, 4096)),
}
SET_ROWS = 64  # of the weight, where nothing else is read


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N] index of a score token, or a token


class Result(NamedTuple):
    values: tuple[Tensor, ...]  # [N] each
    grads: tuple[Tensor, ...]  # of their sum, to hidden and weight


@dataclass(frozen=True)
class Case:
    """set, vocab: score, and log p of a target. log_probs: log p of a token per row. backward: and the gradients."""

    variant: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def backward(self) -> bool:
        return self.variant.endswith("backward")

    @property
    def scores(self) -> bool:
        return not self.variant.startswith("log_probs")

    @property
    def bytes(self) -> int:
        """Memory traffic that no implementation can avoid: hidden, the rows of the weight that are needed, and as much
        again for reading them a second time and writing their gradient."""
        n, h, v = self.shape
        once = (n + (len(IDS) if self.variant == "set" else v)) * h * self.dtype.itemsize
        return (3 if self.backward else 1) * once

    @property
    def flops(self) -> int:
        """One product; backward, two more (remade logits are not counted)."""
        n, h, v = self.shape
        return (3 if self.backward else 1) * 2 * n * h * (len(IDS) if self.variant == "set" else v)

    def inputs(self, generator: torch.Generator) -> Inputs:
        n, h, v = self.shape
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        hidden = (torch.randn(n, h, **options) / h**0.5).to(self.dtype)
        weight = torch.empty(SET_ROWS if self.variant == "set" else v, h, dtype=self.dtype, device=self.device)
        weight.normal_(std=2, generator=generator)
        target = torch.randint(len(IDS) if self.scores else v, (n,), **options)
        return Inputs(hidden.requires_grad_(self.backward), weight.requires_grad_(self.backward), target)


@dataclass(frozen=True)
class Row(record.Row):
    """One line of digit_score.csv; an empty peer was not measured, not installed, or does not do this."""

    library_us: float | None
    fused_us: float | None
    chunked_us: float | None
    liger_us: float | None
    cut_us: float | None
    crossover: str
    """Rows from which on "auto" takes the fused kernel: measured, "never", or empty where it cannot run."""
    extra_bytes: int
    """Most memory in use during a call beyond what was there before it, ours; a CPU's is the resident set's."""
    eager_extra_bytes: int
    chunked_extra_bytes: int | None
    liger_extra_bytes: int | None
    cut_extra_bytes: int | None


def result(case: Case, values: tuple[Tensor, ...], x: Inputs) -> Result:
    grads = torch.autograd.grad(sum(value.sum() for value in values), x[:2]) if case.backward else ()
    return Result(values, grads)


def ours(case: Case, backend: str = "auto") -> Callable[[Inputs], Result]:
    def run(x: Inputs) -> Result:
        if not case.scores:
            return result(case, (token_log_probs(*x, backend=backend),), x)
        normalize = "set" if case.variant == "set" else "vocab"
        out = digit_score(x.hidden, x.weight, IDS, VALUES, normalize=normalize, target=x.target, backend=backend)
        return result(case, (out.score, out.target_log_prob), x)

    return run


def eager(case: Case, dtype: torch.dtype = torch.float32) -> Callable[[Inputs], Result]:
    """As it is written today: logits of the model's dtype, all of them, and their softmax in fp32."""
    ids = torch.tensor(IDS, device=case.device)  # a list would be copied to the device by every call, which waits
    k = torch.tensor(VALUES, dtype=dtype, device=case.device)

    def run(x: Inputs) -> Result:
        if case.variant == "set":
            log_p = (x.hidden.to(dtype) @ x.weight[ids].to(dtype).T).log_softmax(-1)
        else:
            log_p = F.linear(x.hidden, x.weight).to(dtype).log_softmax(-1)
            log_p = log_p[:, ids] if case.scores else log_p
        picked = log_p.gather(1, x.target[:, None])[:, 0]
        return result(case, (log_p.exp() @ k, picked) if case.scores else (picked,), x)

    return run


def compiled(case: Case) -> Callable[[Inputs], Result]:
    """torch.compile of the reference, chunks and all, whose gradient is that of autograd."""
    ids = torch.tensor(IDS, device=case.device)
    k = torch.tensor(VALUES, dtype=torch.float32, device=case.device)

    def values(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        if not case.scores:
            lse, picked, _ = log_sum_exp(hidden, weight, None, target, 1.0, weight.shape[0])
            return (picked - lse,)
        lse = None if case.variant == "set" else log_sum_exp(hidden, weight, None, None, 1.0, weight.shape[0])[0]
        rows = reference_statistics(set_logits(hidden, weight, None, ids, 1.0), lse, k, target)
        return rows[0], rows[5]

    torch._dynamo.reset()
    function = torch.compile(values, fullgraph=True, dynamic=False)
    return lambda x: result(case, function(*x), x)


def reduction(case: Case) -> str:
    return "sum" if case.backward else "none"


def chunked(case: Case) -> Callable[[Inputs], Result]:
    options = {"reduction": reduction(case), "options": torch.nn.LinearCrossEntropyOptions()}
    return lambda x: result(case, (-chunked_cross_entropy(*x, **options),), x)


def liger(case: Case) -> Callable[[Inputs], Result]:
    loss = Liger(reduction=reduction(case))
    return lambda x: result(case, (-loss(x.weight, x.hidden, x.target),), x)


def cut(case: Case) -> Callable[[Inputs], Result]:
    return lambda x: result(case, (-cut_cross_entropy(*x, reduction=reduction(case)),), x)


IMPLEMENTATIONS: dict[str, Callable[[Case], Callable[[Inputs], Result]]] = {
    "ours": ours,
    "eager": eager,
    "compile": compiled,
    "library": partial(ours, backend="reference"),
    "fused": partial(ours, backend="triton"),
    "chunked": chunked,
    "liger": liger,
    "cut": cut,
}
PEERS = {"chunked": chunked_cross_entropy, "liger": Liger, "cut": cut_cross_entropy}


def implementations(case: Case) -> list[str]:
    """Those that are installed and can do the case."""
    absent = {name for name, found in PEERS.items() if found is None or case.scores}
    if case.device.type != "cuda":
        absent |= {"library", "fused", "liger", "cut"}  # "ours" is the library's; the others need a GPU
    if unavailable_reason("triton", case.device, (case.dtype,)) is not None:
        absent.add("fused")
    if case.dtype == torch.float32:
        absent.add("cut")
    if case.backward:
        absent.add("compile")  # autograd would keep the logits of every chunk
    return [name for name in IMPLEMENTATIONS if name not in absent]


def truth(case: Case, x: Inputs) -> Result:
    exact = [tensor.detach().double().requires_grad_(case.backward) for tensor in x[:2]]
    return eager(case, torch.float64)(Inputs(*exact, x.target))


def error(name: str, case: Case, found: Result, exact: Result) -> float:
    """Largest error against fp64 as a fraction of what is allowed: 1e-4 of the largest value, and of the largest
    gradient also four units in the last place; for peers that round the logits to their dtype, 32 units of either."""
    eps = torch.finfo(case.dtype).eps
    rounds = name not in ("ours", "library", "fused", "compile")
    worst = 0.0
    for i, (mine, true) in enumerate(zip((*found.values, *found.grads), (*exact.values, *exact.grads), strict=True)):
        if mine.shape != true.shape:  # a sum
            true = true.sum()
        allowed = 1e-4 + (32 * eps if rounds else 4 * eps if i >= len(found.values) else 0)
        difference = (mine.detach().double() - true.detach()).abs().max() / true.detach().abs().max().clamp(min=1e-2)
        worst = max(worst, float((difference / allowed).nan_to_num(torch.inf)))
    return worst


def checker(case: Case, x: Inputs) -> op_bench.Checker:
    exact = truth(case, x)
    return lambda name, result: error(name, case, result, exact)


def find_crossover(case: Case) -> str:
    """Measured, unless it is known already."""
    if case.device.type != "cuda" or unavailable_reason("triton", case.device, (case.dtype,)) is not None:
        return ""
    crossover = measure_crossover(*case.shape[1:], case.dtype, case.device).rows
    return "never" if crossover is None else str(crossover)


def backend(case: Case) -> str:
    if case.variant == "set":
        return choose_backend("auto", case.device, (case.dtype,), offered=("reference", "triton"))
    find_crossover(case)
    return vocab_backend(*case.shape, case.dtype, case.device)[0]


BENCH = op_bench.OpBench(
    __doc__,
    "digit_score",
    Case,
    IMPLEMENTATIONS,
    checker,
    VARIANTS,
    SHAPES,
    small=(64, 256, 8192),
    backend=backend,
    op=lambda case: "digit_score" if case.scores else "token_log_probs",
    able=implementations,
    captured=lambda variant: variant == "set",  # the others take far longer than a launch
    row=Row,
    more=lambda case: {"crossover": find_crossover(case)},
    asked=lambda case: case.device.type == "cuda" and case.dtype == torch.float32 and case.shape[0] >= 1024,
)

bench, main, test_digit_score = BENCH.bench, BENCH.main, BENCH.speed_test()

if __name__ == "__main__":
    main()
