"""An op called eagerly goes past PyTorch's dispatcher, is an operator to whatever watches it, and knows its limits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtedit_fast.ops import (
    attention_columns,
    crd_loss,
    digit_score,
    nft_loss,
    sde_coefficients,
    sde_step,
    token_log_probs,
    token_similarity,
)


def _inputs(*shape: int, count: int = 3) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


def _sde_step(x: Tensor) -> Tensor:
    table = sde_coefficients(torch.linspace(1, 0, 5), eta=0.7)
    return sde_step(_inputs(4, 8)[0], x, table, 1, prev_sample=_inputs(4, 8)[1]).log_prob


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "sde_step": _sde_step,
    "nft_loss": lambda x: nft_loss(x, *_inputs(4, 8, count=2), torch.full((4,), 0.5), torch.full((4,), 0.7)).loss,
    "crd_loss": lambda x: crd_loss(x, *_inputs(4, 8, count=2), torch.arange(4.0), torch.tensor([0, 0, 1, 1])).loss,
    "digit_score": lambda x: digit_score(x, _inputs(16, 8)[0], [3, 5, 7], [1, 2, 3]).score,
    "token_log_probs": lambda x: token_log_probs(x, _inputs(16, 8)[0], torch.arange(4)),
    "token_similarity": lambda x: token_similarity(x[None], _inputs(1, 4, 8)[0]),
    "attention_columns": lambda x: attention_columns(x[None, None], _inputs(1, 1, 6, 8)[0], torch.tensor([1])),
}


class Watch(TorchDispatchMode):
    """The operators of ours that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mtedit_fast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def gradient(name: str, **options: Any) -> Tensor:
    x = _inputs(4, 8)[2].requires_grad_()
    return torch.autograd.grad(CALLS[name](x).sum(), x, **options)[0]


@pytest.mark.parametrize("name", CALLS)
def test_what_watches_the_dispatcher_sees_the_operator_and_the_same_numbers(name: str) -> None:
    past = gradient(name)
    with Watch() as watch:
        through = gradient(name)
    backward = "velocity_loss_backward" if name in ("nft_loss", "crd_loss") else f"{name}_backward"
    assert watch.seen == [name, backward]
    assert torch.equal(past, through)


@pytest.mark.parametrize("name", CALLS)
def test_eager_calls_go_past_it(name: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradient(name)
    seen = [event.name for event in profile.events() if event.name.startswith("mtedit_fast::")]
    assert seen == []


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_has_no_gradient_and_says_so(name: str) -> None:
    found = gradient(name, create_graph=True)
    assert torch.equal(found, gradient(name))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        found.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_no_graph_where_none_is_asked_for(name: str) -> None:
    x = _inputs(4, 8)[2]
    assert CALLS[name](x).grad_fn is None
    with torch.no_grad():
        assert CALLS[name](x.requires_grad_()).grad_fn is None
