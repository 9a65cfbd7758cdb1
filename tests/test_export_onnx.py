"""Every module class: checked ONNX, the weights' names, onnxruntime against eager, and real engines."""

import onnx
import pytest
import torch
from tiny_export import NAMES, flux, tiny_exportable

pytest.importorskip("onnxruntime")

from mtedit_fast.editors.qwen_transformer import SequenceTables
from mtedit_fast.export.engine import build_engine
from mtedit_fast.export.manifest import Manifest, hash_file, model_hash
from mtedit_fast.export.modules import Exportable, kontext_transformer, vae_decoder
from mtedit_fast.export.onnx import export_onnx, weights_of
from mtedit_fast.export.ports import Bucket, Port, random_inputs
from mtedit_fast.export.qwen import QwenTransformer
from mtedit_fast.export.runtime import OnnxModule
from mtedit_fast.export.write import export_module

BUCKET = Bucket((1, 2, 4), (32, 64, 64), 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def exported(folder):
    """(name) -> the exportable and its entry, exported once."""
    done = {}

    def get(name):
        if name not in done:
            module = tiny_exportable(name)
            bucket = Bucket(BUCKET.batch, 32, 32) if name == "dinov2" else BUCKET  # learned positions: one size
            done[name] = module, export_module(folder, name, module, buckets=[bucket])
        return done[name]

    return get


def eager(module, values):
    with torch.no_grad():
        found = module.call(**values)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_equals_eager_at_every_batch_and_resolution(exported, folder, name):
    module, entry = exported(name)
    onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
    runtime = OnnxModule(folder, name)
    for batch in (1, 3, 4):
        for end in (0, 2):  # the smallest sizes and the largest
            sizes = {size: values[end] for size, values in entry.profiles[0].sizes.items()} | {"batch": batch}
            values = random_inputs(module.inputs, sizes, seed=batch)
            expected, found = eager(module, values), runtime(**values)
            for got, truth in zip((found,) if isinstance(found, torch.Tensor) else found, expected, strict=True):
                assert got.shape == truth.shape
                scale = max(1, truth.abs().max().item())
                torch.testing.assert_close(got, truth, rtol=0, atol=1e-5 * scale)
    assert isinstance(found, torch.Tensor) == (name == "one_step")


@pytest.mark.parametrize("name", NAMES)
def test_weights_keep_their_names_and_values(exported, folder, name):
    module, _ = exported(name)
    state, weights = module.module.state_dict(), weights_of(folder / f"{name}.onnx")
    parts = {"vae_encoder": ("encoder.", "quant_conv."), "vae_decoder": ("decoder.", "post_quant_conv.")}
    unused = ("shared.weight", "embeddings.mask_token")  # T5's tied one, and what training alone reads
    for name_of_part, kept in parts.items():
        if name.endswith(name_of_part):
            state = {key: value for key, value in state.items() if key.startswith(kept)}
            unused = ("time_conv.",)  # between frames, of which there is one
    if name == "qwen":  # the text half of the last block
        unused = ("to_add_out", "transformer_blocks.0.txt_mlp")
    for key, value in state.items():
        if not any(part in key for part in unused):
            assert torch.equal(torch.tensor(weights[key].numpy()), value), key
    # nothing else is as large as a weight
    assert all(v.size <= 4096 for k, v in weights.items() if k not in module.module.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_real_engine_for_two_architectures(exported, folder, name):
    pytest.importorskip("tensorrt_rtx")
    _, entry = exported(name)
    for sm in (80, 89):
        engine = build_engine(folder, name, backend="tensorrt_rtx", sm=sm)
        saved = Manifest.read(folder).entry(name)
        assert saved.engine == engine
        assert (engine.sm, engine.backend, engine.device) == (sm, "tensorrt_rtx", "")
        assert engine.file.sha256 == hash_file(folder / f"{name}.plan")
        assert engine.file.bytes == (folder / f"{name}.plan").stat().st_size > 10_000
        assert (saved.inputs, saved.outputs, saved.profiles) == (entry.inputs, entry.outputs, entry.profiles)


def test_qwen_runs_both_branches_and_rows_of_different_length(exported, folder):
    module, entry = exported("qwen")
    model = module.module
    assert entry.profiles[0].sizes["text"] == (1, 2, 8)
    runtime = QwenTransformer(OnnxModule(folder, "qwen", config=model.config))
    assert (runtime.dtype, runtime.device, runtime.config) == (torch.float32, torch.device("cpu"), model.config)
    tables, grids = SequenceTables(model), ((1, 4, 4), (1, 4, 4))
    (cos, sin), (negative_cos, negative_sin) = tables.rotary(grids, 8), tables.rotary(grids, 6)
    values = {
        "hidden_states": torch.randn(4, 32, 16),
        "encoder_hidden_states": torch.randn(4, 8, 16),
        "timestep": torch.rand(4),
        "rotary_cos": cos,
        "rotary_sin": sin,
        "modulate_index": tables.modulate_index(grids),
    }
    mask = torch.ones(2, 1, 1, 8 + 32, dtype=torch.bool)
    mask[1, ..., 5:8] = False
    guided = values | {"negative_rotary_cos": negative_cos, "negative_rotary_sin": negative_sin}
    for arguments in (values, guided, guided | {"attention_mask": mask}):
        with torch.no_grad():
            expected = model(**arguments)[0]
        for _ in range(2):
            torch.testing.assert_close(runtime(**arguments)[0], expected, rtol=0, atol=1e-5)


def test_half_precision_keeps_attention_in_one_node_and_builds(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    module = kontext_transformer(flux().to(torch.bfloat16).eval(), text_tokens=8)
    entry = export_module(tmp_path, "transformer", module, buckets=[BUCKET, Bucket(4, 32, 32)])
    graph = onnx.load(tmp_path / "transformer.onnx")
    assert entry.opset == 23 == graph.opset_import[0].version
    assert sum(node.op_type == "Attention" for node in graph.graph.node) == 2  # a block of each kind
    assert entry.dtype == "bfloat16"
    assert {port.dtype for port in entry.inputs} == {"bfloat16", "float32"}  # positions and guidance
    assert len(entry.profiles) == 2
    assert build_engine(tmp_path, "transformer", sm=80).file.bytes > 10_000


def test_bf16_with_heads_that_have_no_kernel_builds(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    module = vae_decoder(tiny_exportable("vae_decoder").module.to(torch.bfloat16))
    assert export_module(tmp_path, "vae", module, buckets=[BUCKET]).opset == 22
    assert build_engine(tmp_path, "vae", sm=80).file.bytes > 10_000


class Splits(torch.nn.Module):
    """The splits that leave sequences in a graph."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6))

    def forward(self, x, y):
        joint = torch.cat([x, y], dim=1) * self.weight
        first, second = joint.split_with_sizes([x.shape[1], y.shape[1]], dim=1)
        third = torch.cat([x, x]).chunk(2)[1]
        a, b = third.unbind(-1)[1:3]
        return first.chunk(6, -1)[2] + third.chunk(1)[0].mean(), second.sum(1, keepdim=True) + (a - b)[:, :1, None]


def test_splits_of_every_kind(tmp_path):
    import onnxruntime

    module = Splits().eval()
    ports = [Port("x", "float32", ("batch", "long", 6)), Port("y", "float32", ("batch", "short", 6))]
    outputs = [Port("u", "float32", ("batch", "long", 1)), Port("v", "float32", ("batch", 1, 6))]
    call = lambda **tensors: module(**tensors)  # noqa: E731
    example = {"batch": 2, "long": 5, "short": 3}
    export_onnx(Exportable(module, call, tuple(ports), tuple(outputs), example=example), tmp_path / "s.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    for sizes in (example, {"batch": 1, "long": 2, "short": 7}):
        values = random_inputs(ports, sizes)
        found = session.run(None, {name: value.numpy() for name, value in values.items()})
        for got, truth in zip(found, module(**values), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), truth)


def test_large_weights_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    from mtedit_fast.export import onnx as writer

    module = tiny_exportable("clip")
    monkeypatch.setattr(writer, "EXTERNAL_BYTES", 1000)
    entry = export_module(tmp_path, "clip", module, buckets=[BUCKET])
    assert [file.name for file in entry.files] == ["clip.onnx", "clip.onnx.data"]
    assert entry.files[1].bytes >= 0.9 * sum(weight.nbytes for weight in module.module.parameters())
    values = random_inputs(module.inputs, {"batch": 2, "text": 16})
    torch.testing.assert_close(OnnxModule(tmp_path, "clip")(**values)[1], eager(module, values)[1])


def test_a_size_that_the_trace_fixed_is_an_error(tmp_path):
    class Fixed(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(2, 4)) if x.shape[0] == 2 else super().forward(x)

    module = Fixed(4, 4)
    port = Port("x", "float32", ("batch", 4))
    bad = Exportable(module, lambda x: module(x), (port,), (Port("y", "float32", ("batch", 4)),), example={"batch": 2})
    with pytest.raises(ValueError, match=r"module: expected a Fixed that torch.export can trace.*\['batch'\], got: "):
        export_onnx(bad, tmp_path / "bad.onnx")
    assert not (tmp_path / "bad.onnx").exists()


def test_a_module_with_adapters_is_refused(tmp_path):
    from peft import LoraConfig

    module = tiny_exportable("kontext")
    module.module.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"module: expected no adapters, got \['default'\]; .*merge_lora.*lora_inputs"):
        export_onnx(module, tmp_path / "x.onnx")


def test_the_hash_sees_weights_dtype_and_configuration():
    module = tiny_exportable("clip")
    first = model_hash(module)
    assert first == model_hash(tiny_exportable("clip"))
    with torch.no_grad():
        module.module.state_dict()["encoder.layers.0.mlp.fc1.bias"][3] += 1e-6
    changed = model_hash(module)
    module.module.config.hidden_act = "gelu"
    other = model_hash(module)
    module.module.to(torch.bfloat16)
    assert len({first, changed, other, model_hash(module)}) == 4
