"""How an op is registered, and how it is called: past whatever of PyTorch a call does not need."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """`torch.ops.mtedit_fast.NAME` for torch.compile, export and whatever else watches the dispatcher; called eagerly
    it is a plain function, or a plain autograd function, since the operator's own way costs more than most kernels.

    Args:
        name: of the operator.
        forward: tensors and options to tensors that alias none of them, annotated with types.
        fake: the same, of shapes alone.
        keeps_memory: whether it makes something once per device and keeps it. The graphs of torch.compile's
            mode="reduce-overhead" do not allow what outlives a call.
    """

    def __init__(
        self, name: str, forward: Callable[..., Any], fake: Callable[..., Any], *, keeps_memory: bool = False
    ) -> None:
        self.registered = torch.library.custom_op(
            f"mtedit_fast::{name}",
            forward,
            mutates_args=(),
            device_types=("cpu", "cuda"),
            tags=(torch.Tag.cudagraph_unsafe,) if keeps_memory else (),
        )
        self.registered.register_fake(fake)
        self.overload = getattr(torch.ops.mtedit_fast, name).default
        self.forward = forward
        self.inputs: int | None = None
        self.eager: type[Function] | None = None

    def differentiate(
        self,
        backward: Callable[..., tuple[Tensor | None, ...]],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
        *,
        inputs: int,
    ) -> None:
        """Gives it a gradient, which has none of its own.

        Args:
            backward: of (ctx, *grads), to the gradients of the first `inputs` arguments.
            setup_context: of (ctx, inputs, output), keeps what `backward` needs.
            inputs: how many arguments have gradients.
        """
        others, run = len(self.overload._schema.arguments) - inputs, self.forward

        def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *backward(ctx, *grads), *[None] * others

        class Eager(Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:  # a setup_context beside it would bind a signature in every call
                output = run(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return gradients(ctx, *grads)

        self.registered.register_autograd(gradients, setup_context=setup_context)
        self.inputs, self.eager = inputs, Eager

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self.overload(*args)
        inputs = args[: self.inputs]
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            # What has no gradient, as our backwards, goes through the overload: it raises where one is asked for.
            return self.overload(*args) if self.eager is None else self.eager.apply(*args)
        return self.forward(*args)
