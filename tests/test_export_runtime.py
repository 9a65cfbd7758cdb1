"""Exported modules in place of torch ones: shapes, profiles, casts, adapters, Qwen's call, a judge's DINO."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from tiny_export import flux, tiny_exportable
from torch import nn

pytest.importorskip("onnxruntime")

from mtedit_fast.editors import KontextEditor
from mtedit_fast.export.engine import build_engine
from mtedit_fast.export.lora import graph_lora, lora_inputs, merge_lora, read_lora
from mtedit_fast.export.manifest import Manifest
from mtedit_fast.export.modules import kontext_transformer
from mtedit_fast.export.ports import Bucket, Port, Profile, choose_profile, random_inputs, sizes_of
from mtedit_fast.export.runtime import OnnxModule
from mtedit_fast.export.tensorrt import TensorRTModule
from mtedit_fast.export.write import export_module
from mtedit_fast.training.adapters import Adapters

PORTS = (Port("x", "float32", ("batch", "sequence", 4)), Port("y", "float32", ("batch", 2)))
PROFILES = (
    Profile("small", {"batch": (1, 2, 4), "sequence": (16, 16, 16)}),
    Profile("wide", {"batch": (1, 8, 8), "sequence": (16, 32, 64)}),
)
RANK = 4


def test_buckets_are_read_and_say_what_is_wrong():
    assert Bucket.parse("1x512x768") == Bucket((1, 1, 1), (512,) * 3, (768,) * 3)
    assert Bucket.parse("1-4x512x512-768-1024+2") == Bucket((1, 4, 4), (512,) * 3, (512, 768, 1024), 2)
    assert str(Bucket.parse("1-2-4x64x96+3")) == "1-4x64x96+3"
    for wrong in ("512", "1x512", "0x8x8", "4-1x8x8", "1x8x8+", "axbxc", "1-2-3-4x8x8", "1x8x8+x"):
        with pytest.raises(ValueError, match=r"bucket: expected BATCHxHEIGHTxWIDTH such as"):
            Bucket.parse(wrong)
    with pytest.raises(ValueError, match="batch: expected 0 < smallest"):
        Bucket(0, 8, 8)


def test_sequences_count_the_edit_and_its_references():
    module = kontext_transformer(flux(), text_tokens=7)
    profile = module.profile(Bucket((1, 2, 4), 64, (32, 64, 96), references=2))
    assert profile.sizes == {"batch": (1, 2, 4), "sequence": (3 * 8, 3 * 16, 3 * 24), "text": (7, 7, 7)}
    with pytest.raises(ValueError, match="width: expected a multiple of 16"):
        module.profile(Bucket(1, 64, 40))


def test_sizes_must_agree():
    assert sizes_of(PORTS, {"x": (3, 5, 4), "y": (3, 2)}) == {"batch": 3, "sequence": 5}
    with pytest.raises(ValueError, match=r"y: expected 3 in dimension 0 \(batch\), as in x, got 2"):
        sizes_of(PORTS, {"x": (3, 5, 4), "y": (2, 2)})
    with pytest.raises(ValueError, match="x: expected 4 in dimension 2, got 5"):
        sizes_of(PORTS, {"x": (3, 5, 5), "y": (3, 2)})
    with pytest.raises(ValueError, match=r"y: expected \[batch, 2\], got \[3\]"):
        sizes_of(PORTS, {"x": (3, 5, 4), "y": (3,)})


def test_the_profile_tuned_nearest_is_chosen_and_the_nearest_are_named():
    assert choose_profile(PROFILES, {"batch": 2, "sequence": 16}) == 0
    assert choose_profile(PROFILES, {"batch": 4, "sequence": 16}) == 0  # 1 off its 2, not 4 and 16 off
    assert choose_profile(PROFILES, {"batch": 8, "sequence": 16}) == 1
    assert choose_profile(PROFILES[::-1], {"batch": 2, "sequence": 16}) == 1
    with pytest.raises(ValueError, match=r"no profile covers batch 9, sequence 65; the nearest: wide \(batch 1-8, seq"):
        choose_profile(PROFILES, {"batch": 9, "sequence": 65})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(folder, transformer): the graph takes adapters of rank 4."""
    torch.manual_seed(0)
    model = flux().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("adapted")
    module = lora_inputs(kontext_transformer(model, text_tokens=8), rank=RANK, targets=KontextEditor.lora_targets)
    export_module(folder, "transformer", module, buckets=[Bucket((1, 2, 4), 64, 64)])
    return folder, model


def inputs_of(rows, seed=0):
    ports = kontext_transformer(flux()).inputs
    return random_inputs(ports, {"batch": rows, "sequence": 32, "text": 8}, seed=seed)


def adapter_of(model, rank, seed, prefix="", suffix=""):
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks" in name and "norm" not in name:
            tensors[f"{prefix}{name}.lora_A{suffix}.weight"] = torch.randn(rank, layer.in_features, generator=generator)
            tensors[f"{prefix}{name}.lora_B{suffix}.weight"] = torch.randn(
                layer.out_features, rank, generator=generator
            )
    return {name: 0.2 * tensor for name, tensor in tensors.items()}


def run(model, values):
    with torch.no_grad():
        return model(**values, return_dict=False)[0]


def test_two_adapters_through_one_graph_each_equal_to_its_merged_model(adapted):
    folder, model = adapted
    runtime = OnnxModule(folder, "transformer")
    values = inputs_of(3)
    plain = run(model, values)
    torch.testing.assert_close(runtime(**values, return_dict=False)[0], plain, rtol=0, atol=1e-5)
    # ranks, scalings and the names of diffusers and of peft
    for rank, scaling, prefix, suffix in ((RANK, 2.0, "transformer.", ""), (2, 0.5, "base_model.model.", ".default")):
        tensors = adapter_of(model, rank, rank, prefix, suffix)
        merged = copy.deepcopy(model)
        merge_lora(merged, tensors, scaling)
        expected = run(merged, values)
        assert (expected - plain).abs().max() > 0.1
        runtime.set_lora(tensors, scaling)
        torch.testing.assert_close(runtime(**values)[0], expected, rtol=0, atol=1e-5)
    # a strength for each row: with the adapter, without it, half of it
    half = copy.deepcopy(model)
    merge_lora(half, tensors, scaling / 2)
    mixed = runtime(**values, lora_scale=torch.tensor([1.0, 0.0, 0.5]))[0]
    rows = torch.stack([expected[0], plain[1], run(half, values)[2]])
    torch.testing.assert_close(mixed, rows, rtol=0, atol=1e-5)
    runtime.set_lora({})
    torch.testing.assert_close(runtime(**values)[0], plain, rtol=0, atol=1e-5)


def test_an_engine_takes_the_adapter_as_inputs(adapted):
    pytest.importorskip("tensorrt_rtx")
    folder, _ = adapted
    assert build_engine(folder, "transformer", sm=80).sm == 80
    entry = Manifest.read(folder).entry("transformer")
    assert entry.lora_mode == "inputs"
    assert entry.lora.rank == RANK
    names = {port.name for port in entry.inputs}
    assert {f"{layer}.lora_{factor}" for layer in entry.lora.layers for factor in "AB"} | {"lora_scale"} < names


def test_a_trainers_adapter_is_fed_after_every_update(adapted):
    folder, model = adapted
    trained, runtime, values = copy.deepcopy(model), OnnxModule(folder, "transformer"), inputs_of(2)
    adapters = Adapters(trained, rank=RANK, alpha=8, target_modules=KontextEditor.lora_targets, seed=0)
    for _ in range(2):
        with torch.no_grad():
            for parameter in adapters.parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
        runtime.set_lora(dict(zip(adapters.names, adapters.parameters, strict=True)), scaling=8 / RANK)
        torch.testing.assert_close(runtime(**values)[0], run(trained, values), rtol=0, atol=1e-5)
    runtime.set_lora(adapters.state_dict()["average"], 8 / RANK)
    with adapters.averaged():
        torch.testing.assert_close(runtime(**values)[0], run(trained, values), rtol=0, atol=1e-5)


def test_saved_adapters_are_read_with_their_scaling(adapted, tmp_path):
    from tiny import tiny_editor

    editor = tiny_editor()
    adapters = Adapters(editor.transformer, rank=2, alpha=6, target_modules=KontextEditor.lora_targets, seed=1)
    editor.save_lora(tmp_path)
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        lora = read_lora(path)
        assert lora.scaling == 3.0
        assert len(lora.tensors) == len(adapters.names)
    with pytest.raises(FileNotFoundError, match=r"lora: no file .*safetensors"):
        read_lora(tmp_path / "missing")


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layers_own_rank_and_alpha_are_pefts(tmp_path, rslora):
    def new():
        torch.manual_seed(0)
        return nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v")})})

    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "to_v"],
        rank_pattern={"to_q": 2},
        alpha_pattern={"attn.to_k": 3, "to_v": 6},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    theirs, ours = peft.PeftModel(new(), config), new()
    theirs.save_pretrained(tmp_path)
    merge_lora(ours, *read_lora(tmp_path))
    merged = theirs.merge_and_unload()
    for name in ("to_q", "to_k", "to_v"):
        assert not torch.equal(ours["attn"][name].weight, new()["attn"][name].weight)
        torch.testing.assert_close(ours["attn"][name].weight, merged["attn"][name].weight)


def test_adapters_that_do_not_fit(adapted):
    folder, model = adapted
    runtime = OnnxModule(folder, "transformer")
    good = adapter_of(model, RANK, 0)
    layer = "transformer_blocks.0.attn.to_q"
    for change, message in (
        (
            {"x_embedder.lora_A.weight": torch.zeros(2, 16), "x_embedder.lora_B.weight": torch.zeros(32, 2)},
            "x_embedder",
        ),
        ({f"{layer}.weight": torch.zeros(2)}, "expected keys LAYER.lora_A.weight"),
        ({f"{layer}.lora_A.weight": torch.zeros(RANK, 31)}, f"expected {layer}.lora_A of size 32 along 1"),
        ({f"{layer}.lora_A.weight": torch.zeros(3, 32)}, "of one rank"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.set_lora(good | change)
    with pytest.raises(ValueError, match="expected rank 4 at most, got 6"):
        runtime.set_lora(adapter_of(model, 6, 0))
    with pytest.raises(ValueError, match="only A of"):
        runtime.set_lora({f"{layer}.lora_A.weight": torch.zeros(2, 32)})
    with pytest.raises(ValueError, match=r"got no\.such \(no such layer\)"):
        merge_lora(model, {"no.such.lora_A.weight": torch.zeros(1, 4), "no.such.lora_B.weight": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match=r"targets: expected linear layers.*none for 'nothing'"):
        lora_inputs(kontext_transformer(model), rank=1, targets="nothing")
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        lora_inputs(kontext_transformer(model), rank=0, targets=".*to_q")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="of shape"):
        merge_lora(model, good | {f"{layer}.lora_B.weight": torch.zeros(31, RANK)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_merging_rounds_once():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(torch.bfloat16)
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    expected = (layer[0].weight.double() + 0.7 * up.double() @ down.double()).to(torch.bfloat16)
    merge_lora(layer, {"0.lora_A.weight": down, "0.lora_B.weight": up}, 0.7)
    assert (layer[0].weight.float() - expected.float()).abs().max() <= 2**-8 * expected.float().abs().max()


def test_calls_are_those_of_the_torch_module(adapted, tmp_path):
    folder, model = adapted
    runtime, values = OnnxModule(folder, "transformer", config=model.config), inputs_of(1)
    assert (runtime.dtype, runtime.device, runtime.config) == (torch.float32, torch.device("cpu"), model.config)
    expected = run(model, values)
    cast = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    strided = cast | {"hidden_states": cast["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)}
    torch.testing.assert_close(
        runtime(**strided, return_dict=False, joint_attention_kwargs=None)[0], expected, rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"shape: no profile covers batch 5.*the nearest: 1-4x64x64 \(batch 1-4"):
        runtime(**inputs_of(5))
    with pytest.raises(
        ValueError, match=r"guidance: expected guidance float32 \[batch\], got nothing; inputs: hidden_st"
    ):
        runtime(**{name: value for name, value in values.items() if name != "guidance"})
    with pytest.raises(ValueError, match=r"controlnet: expected one of the graph's inputs"):
        runtime(**values, controlnet=torch.zeros(1))
    module = tiny_exportable("clip")
    export_module(tmp_path, "clip", module)
    clip = OnnxModule(tmp_path, "clip")  # without profiles: any shape
    for shape in ((1, 3), (5, 16)):
        ids = torch.randint(50, shape)
        with torch.no_grad():
            torch.testing.assert_close(clip(ids, output_hidden_states=False).pooler_output, module.call(ids)[1])
    with pytest.raises(ValueError, match="output_hidden_states: expected one of the graph's inputs"):
        clip(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"lora: expected a graph that takes an adapter, got clip with LoRA none"):
        clip.set_lora({})


def test_content_consistency_on_an_exported_dino(tmp_path):
    from mtedit_fast.edival.consistency import ContentConsistency
    from mtedit_fast.export.modules import dino
    from mtedit_fast.training.playground.models import load_dino

    model = load_dino()
    export_module(tmp_path, "dino", dino(model))
    references, edits = torch.rand(1, 3, 64, 64), torch.rand(2, 1, 3, 64, 64)
    box = [[(0.4, 0.5, 0.4, 0.3)]]
    arguments = (references, edits, [[box[0]], [box[0]]], box, [box, box])
    with torch.no_grad():
        expected = ContentConsistency(model)(*arguments, owner=[0, 0])
        found = ContentConsistency(OnnxModule(tmp_path, "dino", config=model.config))(*arguments, owner=[0, 0])
    torch.testing.assert_close(found.score, expected.score, rtol=0, atol=1e-5)


def test_bf16_and_engines_say_where_they_run(adapted, tmp_path):
    manifest = Manifest(modules={"clip": replace(OnnxModule(adapted[0], "transformer").entry, dtype="bfloat16")})
    manifest.write(tmp_path)
    with pytest.raises(ValueError, match=r"clip: expected fp32 or fp16 for onnxruntime on a CPU, got bfloat16"):
        OnnxModule(tmp_path, "clip")
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"device: expected a CUDA GPU to run clip on, found none; .*--runtime onnx"
        ):
            TensorRTModule(tmp_path, "clip")
    folder, model = adapted
    ports = {port.name: port for port in OnnxModule(folder, "transformer").entry.inputs}
    entry = OnnxModule(folder, "transformer").entry
    padded = graph_lora(entry.lora, ports, adapter_of(model, 2, 0), 1.0)
    assert all(not tensor[2:].any() for name, tensor in padded.items() if name.endswith("lora_A"))
