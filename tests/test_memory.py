"""Memory of a forward and of a run, against counts by hand."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from test_cli import run
from tiny_train import tiny_config
from torch import nn

import mtedit_fast.training.config as module
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.memory import MARGIN, FusedAttention, estimate, graph_bytes, peak_bytes
from mtedit_fast.training.playground.models import load_pipeline
from mtedit_fast.training.public_models import FAMILIES, PUBLIC, describe

CONFIGS = Path(module.__file__).parent / "configs"
DOCS = Path(__file__).parents[1] / "docs" / "editors.md"
SIZES = {"1gpu": 1, "8gpu": 8, "16gpu": 16}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_graph_of_an_mlp_by_hand(device):
    """Frozen weights are not counted, as themselves or transposed; x is, for the first layer alone is trained."""
    first, second = nn.Linear(5, 7, device=device), nn.Linear(7, 3, device=device).requires_grad_(False)
    x = torch.empty(11, 5, device=device)
    values = 11 * 5 + 11 * 7 + 11 * 3  # x, tanh's output, the squared output
    assert graph_bytes(lambda: second(first(x).tanh()) ** 2) == 4 * values
    assert graph_bytes(lambda: second(torch.empty(11, 7, device=device))) == 0


def test_storages_count_once_and_fused_attention_as_a_kernel_keeps_it():
    def attention(device):
        joint = torch.empty(2, 4, 130, 3 * 16, device=device, requires_grad=True) * 1
        return F.scaled_dot_product_attention(*joint.chunk(3, dim=-1))

    inputs_output_and_sums = 4 * 2 * 4 * 130 * (3 * 16 + 16 + 1)
    with FusedAttention():
        assert graph_bytes(lambda: attention("meta")) == inputs_output_and_sums
    assert graph_bytes(lambda: attention("cpu")) == inputs_output_and_sums


def flux(device, checkpointing):
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    if checkpointing:
        model.enable_gradient_checkpointing()

    def forward():
        def empty(*size):
            return torch.zeros(*size, device=device)

        with FusedAttention() if device == "meta" else torch.enable_grad():
            return model(
                empty(3, 10, 8), empty(3, 5, 24), empty(3, 12), empty(3), empty(10, 3), empty(5, 3), return_dict=False
            )

    return forward


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformer_on_meta_as_on_the_cpu(checkpointing):
    on_meta, on_cpu = (graph_bytes(flux(device, checkpointing)) for device in ("meta", "cpu"))
    assert on_meta == pytest.approx(on_cpu, rel=0.02)
    if checkpointing:
        assert on_meta < graph_bytes(flux("meta", False)) / 3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_is_of_what_lives_at_once(device):
    def chain():
        x = torch.empty(1000, device=device)
        for _ in range(5):
            x = x + 1  # two at a time
        return x

    assert peak_bytes(chain) == 2 * 4000


def test_parts_of_the_playground_by_formula(tmp_path):
    config = tiny_config(tmp_path, ["rollout.groups_per_iteration=3", "objective.name=nft", "model.lora.rank=4"])
    result, pipeline = estimate(config, 2), load_pipeline()
    assert result.held["transformer"] == sum(p.nbytes for p in pipeline.transformer.parameters())
    encoders = (*pipeline.text_encoder.parameters(), *pipeline.text_encoder_2.parameters())
    assert result.held["text encoders"] == sum(p.nbytes for p in encoders)
    assert result.held["VAE"] == sum(p.nbytes for p in pipeline.vae.parameters())
    joint, single, width, inner = 2, 4, 128, 512
    # in + out of every linear layer: 8 of attention and 2 × 2 feed-forward ones; 3, proj_mlp and proj_out.
    features = joint * (8 * 2 * width + 4 * (width + inner)) + single * (3 * 2 * width + 3 * width + 2 * inner)
    assert result.held["LoRA and optimizer"] == 6 * 4 * 4 * features  # six fp32 copies of rank 4
    # 2 of the 3 groups, 4 members, 2 turns, 16 tokens × 64: 3 states (2 steps), clean, reference; all twice.
    learned = 16 * 64 * 5 * 4 + 2 * 4
    image, text = 3 * 64 * 64 * 4, (16 * 96 + 96) * 4
    assert result.held["trajectories"] == 8 * (2 * (2 * learned + image) + image) + 2 * 2 * text
    phase = max(sum(result.rollout.values()), sum(result.update.values()))
    assert result.total == round((sum(result.held.values()) + phase) * (1 + MARGIN))


def test_shards_rows_and_checkpointing_change_what_they_should(tmp_path):
    base = ["objective.name=nft", "rollout.groups_per_iteration=2", "optimizer.forward_rows=4"]
    whole = estimate(tiny_config(tmp_path, base))
    sharded = estimate(tiny_config(tmp_path, [*base, "run.sharding=fsdp2"]), 4)
    assert sharded.held["transformer"] == -(-whole.held["transformer"] // 4)
    assert 0 < sharded.update["gathered weights"] < whole.held["transformer"]
    twice = estimate(tiny_config(tmp_path, [*base, "optimizer.forward_rows=8"]))
    assert twice.update["graph"] == pytest.approx(2 * whole.update["graph"], rel=0.05)
    less = estimate(tiny_config(tmp_path, [*base, "model.activation_checkpointing=true"]))
    assert less.update["graph"] < whole.update["graph"] / 4
    both = estimate(tiny_config(tmp_path, [*base, "objective.kl_weight=1e-4", "objective.old_decay=ramp"]))
    assert both.update["largest block or forward"] > whole.update["largest block or forward"]
    budget = estimate(tiny_config(tmp_path, [*base[:2], "optimizer.memory_gib=0.05"]))
    assert 0.03 * 2**30 < budget.update["graph"] <= 0.051 * 2**30
    guarded = ["objective.name=grpo_guard", "rollout.groups_per_iteration=2", "advantage.credit=dense_ode"]
    plain = estimate(tiny_config(tmp_path, guarded[1:2])).held["trajectories"]
    more = estimate(tiny_config(tmp_path, guarded)).held["trajectories"]
    assert more - plain == 8 * 2 * 16 * 64 * 4 * (2 + 3)  # the means of two steps, estimates at three states


@pytest.mark.parametrize(
    ("family", "path", "billions"),
    [
        ("kontext", "black-forest-labs/FLUX.1-Kontext-dev", 11.9),
        ("qwen_image_edit", "Qwen/Qwen-Image-Edit", 20.4),
        ("flux2_klein", "black-forest-labs/FLUX.2-klein-4B", 3.9),
        ("flux2_klein", "black-forest-labs/FLUX.2-klein-9B", 9.1),
    ],
)
def test_public_transformers_have_their_published_size(family, path, billions):
    with torch.device("meta"):
        model = FAMILIES[family].transformer.from_config(PUBLIC[path].transformer)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("family", ["kontext", "qwen_image_edit", "flux2_klein"])
def test_configurations_and_docs_state_their_estimate_and_fit_80_gb(family):
    for suffix, gpus in SIZES.items():
        path = CONFIGS / f"{family}_{suffix}.yaml"
        text, config = path.read_text(encoding="utf-8"), load_config(path)
        result = estimate(config, gpus)
        assert f"an estimate that has not been measured: {result.header()}.\n" in text
        assert path.name in text.splitlines()[1]
        row = next(line for line in DOCS.read_text(encoding="utf-8").splitlines() if f"configs/{path.name})" in line)
        assert f"| {gpus} | {result.total / 2**30:.1f} |" in row
        assert result.total < 80e9
        assert (config.model.family, config.rollout.turns, config.rollout.group_size) == (family, 3, 16)
        assert (config.model.lora.rank, config.model.lora.alpha, config.data.size) == (32, 64, (512, 512))
        assert config.rollout.groups_per_iteration % gpus == 0
        if config.run.sharding == "none" and gpus > 1:
            continue
        if gpus > 1:  # only where it is needed
            assert estimate(config.model_copy(update={"run": module.RunConfig()}), gpus).total > 60e9


def test_command_prints_a_table(monkeypatch, capsys):
    assert run(monkeypatch, "memory", CONFIGS / "demo.yaml", "--gpus", 2, "rollout.groups_per_iteration=4") == 0
    out = capsys.readouterr().out
    assert re.search(r"held +│ transformer +│ +0\.0\d", out)
    assert "total" in out


def test_bad_input_names_argument_and_remedy(monkeypatch, capsys):
    demo = load_config(CONFIGS / "demo.yaml")
    with pytest.raises(ValueError, match=r"gpus: expected at least 1, got 0"):
        estimate(demo, 0)
    with pytest.raises(ValueError, match=r"model.path: expected a folder with transformer/config.json, or one of bl"):
        describe("someone/else")
    assert run(monkeypatch, "memory", CONFIGS / "demo.yaml", "model.path=someone/else") == 2
    assert "error: model.path: expected a folder" in capsys.readouterr().err.replace("\n", " ")
