"""digit_score and token_log_probs against full logits, torch.compile of our reference, and fused cross-entropies.

python benchmarks/bench_digit_score.py                      appends to benchmarks/results/digit_score.csv
pytest benchmarks/bench_digit_score.py --benchmark-only     the same calls under pytest-benchmark (make bench)

A shape is rows x H x vocabulary. On a GPU the crossover of library products and the fused kernel is measured first and
`ours` is what "auto" then takes; both are timed as well. The cross-entropies (torch's chunked one, Liger's and
cut-cross-entropy where they are installed) are peers of the log-probs only: none of them knows score tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import harness
import op_bench
import pytest
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
class Row(harness.Row):
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
    k = torch.tensor(VALUES, dtype=dtype, device=case.device)

    def run(x: Inputs) -> Result:
        if case.variant == "set":
            log_p = (x.hidden.to(dtype) @ x.weight[IDS].to(dtype).T).log_softmax(-1)
        else:
            log_p = F.linear(x.hidden, x.weight).to(dtype).log_softmax(-1)
            log_p = log_p[:, IDS] if case.scores else log_p
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


def bench(case: Case, copy_gb_per_s: float, *, graph: bool, compile: bool, min_seconds: float) -> Row:
    """Measures ours and its peers on the same inputs; RuntimeError where one's results are not those of fp64."""
    crossover = find_crossover(case)
    generator = torch.Generator(case.device).manual_seed(0)
    sets = [case.inputs(generator) for _ in range(harness.rotations(case.bytes, case.device))]
    exact = truth(case, sets[0])
    calls: dict[str, list[harness.Call]] = {}
    errors: dict[str, float] = {}
    for name in implementations(case):
        if name == "compile" and not compile:
            continue
        run = IMPLEMENTATIONS[name](case)
        errors[name] = error(name, case, run(sets[0]), exact)
        if not errors[name] <= 1:
            raise RuntimeError(f"{name} {case}: {errors[name]:.3g} times the error that is allowed: no row")
        calls[name] = [partial(run, x) for x in sets]
    del exact
    memory = {name: harness.extra_bytes(each[0], case.device) for name, each in calls.items()}
    times = harness.measure(calls, case.device, graph=graph, min_seconds=min_seconds)
    row = harness.compared(
        columns(case, graph),
        times,
        bytes=case.bytes,
        flops=case.flops,
        copy_gb_per_s=copy_gb_per_s,
        error=errors["ours"],
    )
    others = ("library", "fused", "chunked", "liger", "cut")
    return Row(
        **asdict(row),
        **{f"{name}_us": times[name].median if name in times else None for name in others},
        crossover=crossover,
        extra_bytes=memory["ours"],
        eager_extra_bytes=memory["eager"],
        **{f"{name}_extra_bytes": memory.get(name) for name in others[2:]},
    )


def find_crossover(case: Case) -> str:
    """Measured, unless it is known already."""
    if case.device.type != "cuda" or unavailable_reason("triton", case.device, (case.dtype,)) is not None:
        return ""
    rows = measure_crossover(*case.shape[1:], case.dtype, case.device).rows
    return "never" if rows is None else str(rows)


def columns(case: Case, graph: bool) -> dict[str, Any]:
    n, h, v = case.shape
    if case.variant == "set":
        backend = choose_backend("auto", case.device, (case.dtype,), offered=("reference", "triton"))
    else:
        find_crossover(case)
        backend, _ = vocab_backend(n, h, v, case.dtype, case.device)
    return op_bench.columns(case, "digit_score" if case.scores else "token_log_probs", backend, graph)


def main(arguments: Sequence[str] | None = None) -> None:
    missing = [name for name, found in PEERS.items() if found is None]
    if missing:
        print(f"not installed and left out: {', '.join(missing)}")
    op_bench.command(
        __doc__,
        harness.RESULTS / "digit_score.csv",
        Case,
        bench,
        columns,
        variants=VARIANTS,
        shapes=SHAPES,
        arguments=arguments,
        captured=lambda variant: variant == "set",  # the others take far longer than a launch
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_digit_score(benchmark, variant: str, dtype: str, implementation: str) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    case = Case(variant, (64, 256, 8192), op_bench.DTYPES[dtype], device)
    if implementation not in implementations(case):
        pytest.skip(f"{implementation} does not do this case, or is not installed")
    x = case.inputs(torch.Generator(device).manual_seed(0))
    run = IMPLEMENTATIONS[implementation](case)
    assert error(implementation, case, run(x), truth(case, x)) <= 1

    def call() -> None:
        run(x)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"digit_score {variant} {dtype}"
    benchmark(call)


if __name__ == "__main__":
    main()
