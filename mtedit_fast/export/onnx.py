"""ONNX files that keep the weights' names and that TensorRT's parser takes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .modules import Exportable
from .ports import Port, random_inputs

EXTERNAL_BYTES = 1 << 30
"""Weights above this go to a file of their own: protobuf ends at 2 GB."""


def require_onnx() -> None:
    """ImportError, with its remedy, where the exporter's packages are missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export: expected onnx and onnxscript, got {error}; run pip install 'mtedit-fast[export]'"
        ) from None


class _Traced(nn.Module):
    """Tensors by position, as torch.export wants them where their number varies."""

    def __init__(self, exported: Exportable):
        super().__init__()
        self.module = exported.module
        self._call, self._names = exported.call, [port.name for port in exported.inputs]

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._call(**dict(zip(self._names, tensors, strict=True)))


@torch.no_grad()
def export_onnx(exported: Exportable, path: str | Path, *, opset: int | None = None) -> int:
    """Write the graph, checked, with every weight under its name in the module's state dict; returns the opset.

    Weights of more than `EXTERNAL_BYTES` are streamed to `path` + ".data", one tensor at a time from where they lie: no
    second copy in memory.

    Args:
        opset: default: see `Exportable.opset`.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: the module has adapters, or the trace made a dynamic dimension fixed.
        OSError: `path` cannot be written.
    """
    require_onnx()
    adapters: Any = getattr(exported.module, "peft_config", None)
    if adapters:
        raise ValueError(
            f"module: expected no adapters, got {sorted(adapters)}; export the plain model with the "
            "LoRA merged (merge_lora) or as inputs (lora_inputs)"
        )
    opset = opset or exported.opset
    model = _trace(exported, opset)
    _fold(model)
    _rename(model, exported)
    _write(model, Path(path))
    return opset


def _trace(exported: Exportable, opset: int) -> Any:
    device = next(exported.module.parameters()).device
    example = random_inputs(exported.inputs, exported.example, device=device)
    shapes = tuple(
        {axis: size for axis, size in enumerate(port.shape) if isinstance(size, str)} for port in exported.inputs
    )
    was_training = exported.module.training
    exported.module.eval()
    try:
        with _quiet():
            program = torch.onnx.export(
                _Traced(exported),
                tuple(example.values()),
                input_names=[port.name for port in exported.inputs],
                output_names=[port.name for port in exported.outputs],
                dynamic_shapes=(shapes,),
                opset_version=opset,
                dynamo=True,
                optimize=False,  # the optimiser renames weights
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:600]
        raise ValueError(
            f"module: expected a {type(exported.module).__name__} that torch.export can trace with dynamic sizes "
            f"{sorted(exported.example)}, got: {reason}"
        ) from error
    finally:
        exported.module.train(was_training)
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fold(model: Any) -> None:
    """Fold what does not depend on weights: TensorRT wants axes as constants, and Split for SplitToSequence."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    def should_fold(node: Any) -> bool | None:  # a folded weight would lose its name
        return False if any(value is not None and value.is_initializer() for value in node.inputs) else None

    for node in list(model.graph):
        if node.op_type == "SplitToSequence" and len(node.inputs) > 1:
            _prepare_split(node)
    fold_constants(model, should_fold=should_fold)
    RemoveUnusedNodesPass()(model)
    for node in model.graph:
        node.metadata_props.clear()  # stack traces: most of the file, and the exporting machine's paths
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    left = sorted({node.op_type for node in nodes if "Sequence" in node.op_type})
    if left:
        raise ValueError(
            f"module: expected a graph without sequences, got {', '.join(left)}, which TensorRT cannot parse; split "
            "into a fixed number of parts"
        )


def _prepare_split(node: Any) -> None:
    """What the folding does not see: how many sizes a list has; and parts whose one size is known only at run time."""
    import numpy as np
    import onnx_ir as ir

    data, sizes = node.inputs
    made = sizes.producer()
    if made is not None and made.op_type == "Concat":  # a list, one element each
        sizes.shape, sizes.dtype = ir.Shape([len(made.inputs)]), ir.DataType.INT64
        return
    if sizes.shape is None or sizes.shape.rank() != 0 or ir.convenience.get_const_tensor(sizes) is not None:
        return

    def add(op: str, *inputs: Any) -> Any:
        new = ir.node(op, list(inputs))
        node.graph.insert_before(use, new)
        return new.outputs[0]

    def constant(value: int) -> Any:
        new = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([value], np.int64))})
        node.graph.insert_before(use, new)
        return new.outputs[0]

    for use in [use.node for use in node.outputs[0].uses()]:
        index = int(_constant(use.inputs[1]))
        part, size = use.outputs[0], add("Reshape", sizes, constant(-1))
        start, stop = (add("Mul", size, constant(factor)) for factor in (index, index + 1))
        piece = add("Slice", data, start, stop, constant(node.attributes.get_int("axis", 0)))
        piece.dtype, piece.shape = part.dtype, part.shape
        ir.convenience.replace_all_uses_with(part, piece)
        node.graph.remove(use, safe=True)
    node.graph.remove(node, safe=True)


def _constant(value: Any) -> Any:
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None  # of a trace: which part, by number
    return tensor.numpy()


def _rename(model: Any, exported: Exportable) -> None:
    """Weights by their names in the state dict, ports and dimensions by theirs; asserted."""
    import onnx_ir as ir

    state = exported.module.state_dict()
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        name = value.name.removeprefix("module.")
        if name != value.name:
            initializers.pop(value.name)
            value.name = name
            initializers[name] = value
    shared = {tensor.data_ptr(): name for name, tensor in state.items()}
    for name, value in initializers.items():
        source: Any = getattr(value.const_value, "raw", None)
        owner = shared.get(source.data_ptr()) if isinstance(source, Tensor) else None
        if name not in state and owner is not None and source.numel() > 1:
            raise ValueError(f"module: expected weight {owner} under its name, got it as {name}")
    for port, value in zip(
        (*exported.inputs, *exported.outputs), (*model.graph.inputs, *model.graph.outputs), strict=True
    ):
        if value.name != port.name:
            raise ValueError(f"{port.name}: expected a port of this name, got {value.name}")
        _check_port(port, value)
    for value, port in zip(model.graph.outputs, exported.outputs, strict=True):
        value.shape = ir.Shape(port.shape)


def _check_port(port: Port, value: Any) -> None:
    got = [size if isinstance(size, int) else None for size in value.shape]
    expected = [size if isinstance(size, int) else None for size in port.shape]
    if got != expected:
        raise ValueError(
            f"{port.name}: expected [{', '.join(map(str, port.shape))}], got {value.shape} from the trace; a size that "
            "became fixed depends on a condition in the model's forward"
        )
    if str(value.dtype).lower().replace("ir.", "") not in (port.dtype, port.dtype.replace("float32", "float")):
        raise ValueError(f"{port.name}: expected {port.dtype}, got {value.dtype} from the trace")


def _write(model: Any, path: Path) -> None:
    import onnx
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if size <= EXTERNAL_BYTES:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data")
    onnx.checker.check_model(os.fspath(path), full_check=size <= EXTERNAL_BYTES)


def weights_of(path: str | Path) -> Mapping[str, Any]:
    """The initializers of a graph by name, for refits and tests; external ones are mapped, not read."""
    import onnx_ir as ir

    return {name: value.const_value for name, value in ir.load(path).graph.initializers.items()}
