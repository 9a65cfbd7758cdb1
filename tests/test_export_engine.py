"""Engine folders: keys, hashes, refusals, missing packages. One tiny text encoder serves all."""

import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from tiny_export import tiny_exportable

pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx")

from mtedit_fast.export import backends, engine, manifest, write
from mtedit_fast.export.backends import load_backend
from mtedit_fast.export.engine import build_engine, check_network
from mtedit_fast.export.manifest import Manifest, key_of, verify, verify_engine
from mtedit_fast.export.ports import Bucket, Port
from mtedit_fast.export.runtime import OnnxModule
from mtedit_fast.export.write import export_module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    export_module(folder, "clip", tiny_exportable("clip"), buckets=[Bucket((1, 1, 2), 8, 8)])
    build_engine(folder, "clip", sm=89)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def here(entry, **other):
    machine = {"backend": entry.engine.backend, "version": entry.engine.version, "sm": entry.engine.sm, "device": ""}
    return machine | other


def test_an_engine_is_accepted_where_it_was_built_for(folder):
    entry = Manifest.read(folder).entry("clip")
    assert verify_engine(folder, "clip", entry, **here(entry)) == folder / "clip.plan"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sm": 80}, "built for compute capability SM89, and here it is SM80"),
        ({"version": "1.0"}, "built for version .*, and here it is 1.0"),
        ({"backend": "tensorrt"}, "built for library tensorrt_rtx, and here it is tensorrt"),
    ],
)
def test_an_engine_for_another_machine_is_refused(folder, other, message):
    entry = Manifest.read(folder).entry("clip")
    with pytest.raises(ValueError, match=f"clip: the engine was {message}; export again"):
        verify_engine(folder, "clip", entry, **here(entry, **other))


def test_compatibility_widens_what_is_accepted(folder):
    entry = Manifest.read(folder).entry("clip")

    def accepts(where, **built):
        entry.engine = replace(entry.engine, **built)
        entry.engine = replace(entry.engine, key=key_of(entry, entry.engine))
        try:
            return bool(verify_engine(folder, "clip", entry, **where))
        except ValueError:
            return False

    h100 = {"backend": "tensorrt", "version": "10.12.0", "sm": 90, "device": "H100", "version_compatible": False}
    at = {"backend": "tensorrt", "version": "10.12.0", "sm": 90, "device": "H100"}
    assert accepts(at, **h100, compatibility="none")
    assert not accepts(at | {"device": "H200"}, **h100, compatibility="none")
    assert accepts(at | {"device": "H200"}, **h100, compatibility="same_compute_capability")
    assert not accepts(at | {"device": "A100", "sm": 80}, **h100, compatibility="same_compute_capability")
    assert accepts(at | {"device": "A100", "sm": 80}, **h100, compatibility="ampere_plus")
    assert not accepts(at | {"device": "T4", "sm": 75}, **h100, compatibility="ampere_plus")
    later = h100 | {"version_compatible": True}
    assert accepts(at | {"version": "10.14.1"}, **later, compatibility="none")
    assert not accepts(at | {"version": "11.0.0"}, **later, compatibility="none")


def test_damaged_foreign_and_missing_plans_are_refused_before_they_are_opened(folder):
    entry, plan = Manifest.read(folder).entry("clip"), folder / "clip.plan"
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"clip.plan: expected \d+ bytes, got \d+: truncated"):
        verify_engine(folder, "clip", entry, **here(entry))
    plan.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"clip.plan: its SHA-256 is not the manifest's"):
        verify_engine(folder, "clip", entry, **here(entry))
    plan.unlink()
    with pytest.raises(ValueError, match=r"clip.plan: in the manifest, but not in"):
        verify_engine(folder, "clip", entry, **here(entry))
    graph = folder / "clip.onnx"
    graph.write_bytes(graph.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"clip.onnx: expected \d+ bytes"):
        OnnxModule(folder, "clip")


def test_every_part_of_the_key_changes_it():
    folder_entry = manifest.Entry(
        inputs=(Port("x", "float32", ("batch",)),),
        outputs=(Port("y", "float32", ("batch",)),),
        dtype="float32",
        opset=20,
        model_hash="a",
        files=(),
        profiles=(manifest.Profile("p", {"batch": (1, 2, 3)}),),
    )
    built = ("tensorrt", "10.12", 90, "H100", "none", False)
    changes = [
        {"model_hash": "b"},
        {"lora_mode": "merged"},
        {"lora": manifest.LoraShape(4, ("a",))},
        {"lora": manifest.LoraShape(8, ("a",))},
        {"profiles": (manifest.Profile("p", {"batch": (1, 2, 4)}),)},
        {"opset": 23},
        {"dtype": "bfloat16"},
        {"inputs": (Port("x", "float16", ("batch",)),)},
    ]
    keys = {replace(folder_entry, **change).engine_key(*built) for change in [{}, *changes]}
    others = [("tensorrt_rtx", *built[1:]), (built[0], "10.13", *built[2:]), (*built[:2], 100, *built[3:])]
    others += [(*built[:3], "H200", *built[4:]), (*built[:4], "ampere_plus", False), (*built[:5], True)]
    keys |= {folder_entry.engine_key(*other) for other in others}
    assert len(keys) == 1 + len(changes) + len(others)
    assert folder_entry.engine_key(*built) == replace(folder_entry).engine_key(*built)


def test_an_engine_of_other_weights_is_refused(folder):
    saved = json.loads((folder / "manifest.json").read_text())
    saved["modules"]["clip"]["model_hash"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(saved))
    entry = Manifest.read(folder).entry("clip")
    with pytest.raises(ValueError, match="clip: the engine was built from other weights, LoRA mode or profiles"):
        verify_engine(folder, "clip", entry, **here(entry))


def test_the_same_engine_is_kept_and_a_damaged_one_built_again(folder, monkeypatch):
    plan = folder / "clip.plan"
    whole, when = plan.read_bytes(), plan.stat().st_mtime_ns
    first = build_engine(folder, "clip", sm=89)
    assert plan.stat().st_mtime_ns == when
    plan.write_bytes(b"nothing")
    assert build_engine(folder, "clip", sm=89).key == first.key
    assert plan.stat().st_size == len(whole)
    assert build_engine(folder, "clip", sm=86).key != first.key
    assert next(folder.glob("timings-tensorrt_rtx-*-sm86.cache")).stat().st_size > 0


def test_a_stopped_export_leaves_nothing_that_loads(folder, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "model_hash", stopped)  # the graph is there, the manifest not yet
    with pytest.raises(KeyboardInterrupt):
        export_module(tmp_path / "new", "clip", tiny_exportable("clip"))
    with pytest.raises(FileNotFoundError, match=r"directory: expected an export, with manifest.json, got .*run mtedit"):
        OnnxModule(tmp_path / "new", "clip")
    with pytest.raises(KeyboardInterrupt):  # over a former one
        export_module(folder, "clip", tiny_exportable("clip"))
    with pytest.raises(ValueError, match="module: expected one of none, got 'clip'"):
        OnnxModule(folder, "clip")
    assert not list(folder.glob(".partial-*"))


def test_a_stopped_build_keeps_the_former_engine(folder, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    before = (folder / "clip.plan").read_bytes()
    monkeypatch.setattr(engine._Build, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_engine(folder, "clip", sm=80)
    entry = Manifest.read(folder).entry("clip")
    assert verify_engine(folder, "clip", entry, **here(entry)).read_bytes() == before


def test_manifests_that_cannot_be_read(folder):
    path = folder / "manifest.json"
    whole = path.read_text()
    for text in (whole[:200], whole.replace('"format": 1', '"format": 99'), "[]", "{}"):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"directory: .*manifest.json cannot be read .*run mtedit-fast export again"
        ):
            Manifest.read(folder)


def test_unwritable_output(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"output: expected a folder to write to, got .*/file"):
        export_module(file, "clip", tiny_exportable("clip"))


def test_targets_that_a_library_does_not_have(folder):
    with pytest.raises(
        ValueError, match=r"sm: tensorrt_rtx builds for SM75, .*SM80, .*SM89.*got SM90; use --to tensorrt"
    ):
        build_engine(folder, "clip", sm=90)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sm: there is no GPU to take it from; pass one of 75, 80"):
            build_engine(folder, "clip")
    for options in ({"compatibility": "ampere_plus"}, {"version_compatible": True}):
        with pytest.raises(
            ValueError, match="compatibility, version_compatible: expected the defaults with tensorrt_rtx"
        ):
            build_engine(folder, "clip", sm=80, **options)
    with pytest.raises(ValueError, match="compatibility: expected one of none, same_compute"):
        build_engine(folder, "clip", sm=80, compatibility="all")
    with pytest.raises(ValueError, match="to: expected onnx, tensorrt or tensorrt_rtx, got 'openvino'"):
        build_engine(folder, "clip", backend="openvino")


def test_no_buckets_no_engine(tmp_path):
    export_module(tmp_path, "clip", tiny_exportable("clip"))
    with pytest.raises(ValueError, match=r"buckets: expected at least one for clip, got none; .*--bucket"):
        build_engine(tmp_path, "clip", sm=80)
    entry = Manifest.read(tmp_path).entry("clip")
    with pytest.raises(ValueError, match="clip: expected an engine, got ONNX only; run mtedit-fast export --to tens"):
        verify_engine(tmp_path, "clip", entry, backend="tensorrt", version="10", sm=90, device="")


@pytest.mark.parametrize(
    ("name", "remedy"), [("tensorrt", "pip install 'tensorrt'"), ("tensorrt_rtx", "fast\\[export")]
)
def test_missing_packages_are_named(monkeypatch, name, remedy):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"to: {name} cannot be imported .*{remedy}.*onnxruntime work without it"):
        load_backend(name)


def test_missing_onnx_packages_are_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r"runtime: onnxruntime cannot be imported.*pip install 'mtedit-fast\[export\]"
    ):
        OnnxModule(folder, "clip")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"export: expected onnx and onnxscript.*pip install 'mtedit-fast\[export\]"):
        export_module(folder, "other", tiny_exportable("clip"))


def test_an_old_tensorrt_and_one_without_a_gpu(monkeypatch):
    old = ModuleType("tensorrt")
    old.__version__ = "10.9.0"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(ValueError, match=r"to: expected tensorrt >= 10.12, got 10.9.0"):
        load_backend("tensorrt")
    old.__version__ = "10.12.0"
    monkeypatch.setattr(backends, "_device_sm", lambda: None)
    with pytest.raises(ValueError, match=r"to: tensorrt builds on the GPU it builds for.*--to tensorrt_rtx.*--to onnx"):
        load_backend("tensorrt").target(90)
    monkeypatch.setattr(backends, "_device_sm", lambda: 90)
    assert load_backend("tensorrt").target(None) == 90
    with pytest.raises(ValueError, match="sm: tensorrt builds for the GPU that is here, SM90, got 80"):
        load_backend("tensorrt").target(80)


def test_the_parsed_network_is_compared_with_the_manifest(folder):
    import tensorrt_rtx as trt

    entry = Manifest.read(folder).entry("clip")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(folder / "clip.onnx"))
    check_network(network, entry)
    ids, (hidden, pooled) = entry.inputs[0], entry.outputs
    for changed, message in (
        ({"inputs": (replace(ids, name="ids"),)}, r"inputs: expected \['ids'\], got \['input_ids'\]"),
        (
            {"inputs": (replace(ids, shape=("batch", 16)),)},
            r"input input_ids: expected int64 \[-1, 16\], got int64 \[-1, -1",
        ),
        ({"inputs": (replace(ids, dtype="float32"),)}, r"input input_ids: expected float32"),
        ({"outputs": (pooled, hidden)}, r"outputs: expected \['pooler_output', 'last"),
        (
            {"outputs": (hidden, replace(pooled, shape=("batch", 17)))},
            r"output pooler_output: expected float32 \[-1, 17\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_network(network, replace(entry, **changed))


def test_a_graph_that_the_library_refuses(folder):
    graph = folder / "clip.onnx"
    graph.write_bytes(b"not a graph")
    saved = Manifest.read(folder)
    saved.modules["clip"].files = (manifest.File.of(graph),)
    saved.write(folder)
    with pytest.raises(ValueError, match=r"clip: tensorrt_rtx .* cannot parse clip.onnx"):
        build_engine(folder, "clip", sm=80)
    assert verify(folder, saved.modules["clip"].engine.file)
