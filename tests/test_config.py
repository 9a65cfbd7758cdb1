"""Configurations: files, overrides, round trips, and errors that name the field."""

from pathlib import Path

import pytest
import yaml

import mtedit_fast.training.config as module
from mtedit_fast.training.config import TrainConfig
from mtedit_fast.training.config_file import dump_config, load_config

CONFIGS = Path(module.__file__).parent / "configs"
MINIMAL = {"data": {"path": "chains.jsonl"}, "rewards": [{"name": "r", "path": "pkg.mod:fn"}]}


def test_demo_is_the_playground():
    config = load_config(CONFIGS / "demo.yaml")
    assert config.model.path is None
    assert config.exact_replay
    assert config.evaluation.chains >= 400
    assert load_config(str(CONFIGS / "demo.yaml"), []) == config


def test_kontext_template_documents_every_key():
    text = (CONFIGS / "kontext_lora.yaml").read_text(encoding="utf-8")
    config = load_config(CONFIGS / "kontext_lora.yaml")
    assert config.model.path == "black-forest-labs/FLUX.1-Kontext-dev"
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("# "))
    assert head + dump_config(config, comments=True) == text
    for section in config.model_dump().values():
        for item in section if isinstance(section, list) else [section]:
            assert all(f"{key}:" in text for key in item)


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("name", ["demo.yaml", "kontext_lora.yaml"])
def test_dump_reads_back_equal(name, comments, tmp_path):
    config = load_config(CONFIGS / name, ["data.resolution=[64, 96]", "optimizer.lr=1e-7", "run.seed=3"])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config, comments=comments), encoding="utf-8")
    assert load_config(path) == config


def test_overrides():
    overrides = [
        "rollout.eta=1e-1",
        "rollout.window.size=3",
        "rollout.window.hi=5",
        "rewards.0.weight=0.3",
        "model.lora.target_modules=[to_q, to_k]",
        "objective.name=grpo_guard",
        "advantage.aggregator=product",
        "evaluation.num_steps=null",
        "optimizer.betas=[0.8,0.9]",
        "run.output_dir=runs/a=b",
        "model.path=/weights/kontext",
        "data.resolution=[512, 768]",
    ]
    config = load_config(MINIMAL, overrides)
    assert config.rollout.eta == 0.1
    assert config.rollout.window is not None
    assert config.rollout.window.model_dump() == {"size": 3, "lo": 0, "hi": 5}
    assert config.rewards[0].weight == 0.3
    assert config.model.lora.target_modules == ["to_q", "to_k"]
    assert config.objective.name == "grpo_guard"
    assert config.advantage.aggregator == "product"
    assert config.evaluation.num_steps is None
    assert config.optimizer.betas == [0.8, 0.9]
    assert config.run.output_dir == "runs/a=b"
    assert config.data.size == (512, 768)
    assert load_config(MINIMAL).data.size == (64, 64)
    assert load_config(MINIMAL) == TrainConfig.model_validate(MINIMAL)
    assert MINIMAL == {"data": {"path": "chains.jsonl"}, "rewards": [{"name": "r", "path": "pkg.mod:fn"}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_sise=8", r"rollout\.group_sise: unknown key; did you mean 'group_size'\?"),
        ("rolout.eta=1", r"rolout: unknown key; did you mean 'rollout'\?"),
        ("model.lora.rnk=4", r"model\.lora\.rnk: unknown key; did you mean 'rank'\?"),
        ("rollout.window.sise=4", r"rollout\.window\.sise: unknown key; did you mean 'size'\?"),
        ("rewards.0.weigth=4", r"rewards\.0\.weigth: unknown key; did you mean 'weight'\?"),
        ("data.zzz=4", r"data\.zzz: unknown key; expected one of path, resolution"),
        ("rollout.group_size=eight", r"rollout\.group_size: Input should be a valid integer, got 'eight'"),
        ("rollout.group_size='8'", r"rollout\.group_size: Input should be a valid integer, got '8'"),
        ("rollout.group_size=true", r"rollout\.group_size: Input should be a valid integer, got True"),
        ("rollout.group_size=1", r"rollout\.group_size: Input should be greater than or equal to 2, got 1"),
        ("rollout.eta=-0.5", r"rollout\.eta: Input should be greater than 0, got -0\.5"),
        ("rollout.eta=.nan", r"rollout\.eta: Input should be a finite number"),
        ("rollout.variant=sd", r"rollout\.variant: Input should be 'sde', 'cps', .* 'ode' or 'dpm2m', got 'sd'"),
        ("rollout=3", r"rollout: Input should be a valid dictionary.*got 3"),
        (
            "rollout.window={size: 3, lo: 2, hi: 4}",
            r"rollout\.window: expected lo \+ size <= hi <= .*lo=2, size=3, hi=4",
        ),
        ("rollout.window={size: 2, hi: 6}", r"rollout\.window: .*num_steps - 1 = 5 \(the last step is deterministic\)"),
        ("rollout.window.size=2", r"rollout\.window\.hi: required, but missing"),
        ("data.resolution=512x512", r"data\.resolution: expected pixels, such as 512 or \[512, 768\], got '512x512'"),
        ("data.resolution=[1, 2, 3]", r"data\.resolution: expected pixels"),
        ("rollout={latent_chain: true, reference_resolution: 32}", r"reference_resolution: expected null with latent"),
        (
            "rollout.precision=fp8",
            r"rollout\.precision: fp8 cannot be replayed exactly: expected .*forward_rows",
        ),
        ("objective.importance_cap=2.0", r"importance_cap: expected null where there is nothing to correct"),
        ("model.compile=true", r"model\.compile: Input should be 'none', 'blocks' or 'whole', got True"),
        ("model.lora.dropout=0.1", r"model\.lora\.dropout: expected 0, because dropout would break the exact replay"),
        ("model.family=sdxl", r"model\.family: Input should be 'kontext', .* or 'flux2_klein_kv', got 'sdxl'"),
        ("rewards=[]", r"rewards: List should have at least 1 item"),
        ("rewards.0.path=pkg.mod.fn", r"rewards\.0\.path: String should match pattern"),
        ("rewards=[{name: a, path: p:f}, {name: a, path: q:f}]", r"rewards: expected distinct names, got a more than"),
        ("advantage.fusion=sum", r"advantage\.fusion: expected one of reward, .*, pareto, got 'sum'"),
        ("optimizer={forward_rows: 8, memory_gib: 1}", r"optimizer: expected forward_rows or memory_gib"),
        ("rollout.variant=ode", r"rollout\.variant: objective grpo needs a stochastic sampler such as 'sde'"),
        ("objective={name: nft, draws: 7}", r"objective\.draws: expected at most the 6 noise levels"),
        ("rewards.0.range=[5, 1]", r"rewards\.0\.range: expected \[lo, hi\] with lo < hi, got \[5\.0, 1\.0\]"),
        ("rewards=[{name: a, path: p:f, range: [0, 1], binarize: 2}]", r"binarize: expected a score within range"),
        ("rewards=[{name: a/b, path: p:f}]", r"rewards\.0\.name: String should match pattern"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer\.betas\.1: Input should be less than 1, got 1\.0"),
        ("run.control=shufle", r"run\.control: Input should be 'none' or 'shuffle', got 'shufle'"),
        ("rollout.eta", r"override 'rollout\.eta': expected key=value"),
        ("=3", r"override '=3': expected key=value"),
        ("rewards.1.weight=1", r"override 'rewards\.1\.weight=1': expected an index below 1, got '1'"),
        ("rewards.x=1", r"expected an index below 1, got 'x'"),
        ("rewards.0.name.x=1", r"name is a value, not a section"),
        ("run.seed=[1", r"override 'run\.seed=\[1': the value is not valid YAML"),
    ],
)
def test_wrong_overrides_name_the_field(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(MINIMAL, [override])


def test_combinations_that_cannot_be():
    nft = "objective.name=nft"
    for overrides, message in (
        (["model.family=flux2_klein_kv", "run.sharding=fsdp2"], r"run\.sharding: .*with model.family flux2_klein_kv"),
        (["rollout.engine=engines"], r"rollout\.engine: .*expected objective.name nft or crd.*got grpo and none"),
        ([nft, "rollout.engine=engines", "run.sharding=fsdp2"], r"rollout\.engine: .*got nft and fsdp2"),
        ([nft, "rollout.precision=fp8", "run.sharding=fsdp2"], r"rollout\.precision: expected model with run.shard"),
        (
            ["rollout.variant=cps", "objective.name=grpo_guard"],
            r"rollout\.variant: grpo_guard corrects Gaussian .*'cps'",
        ),
        ([nft, "objective.importance_cap=2.0"], r"importance_cap: expected null"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(MINIMAL, overrides)


def test_every_mistake_is_reported_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"rollout": {"turn": 3, "eta": "high"}}))
    with pytest.raises(ValueError, match=r"bad\.yaml:") as caught:
        load_config(path)
    text = str(caught.value)
    assert "rollout.turn: unknown key; did you mean 'turns'?" in text
    assert "rollout.eta: Input should be a valid number, got 'high'" in text
    assert "rewards: required, but missing" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", r"expected sections such as 'model:', got list"),
        ("", r"expected sections such as 'model:', got NoneType"),
        ("a: [", r"not valid YAML"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", r"key 'run' given twice, again in line 2"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_configurations_of_the_package_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("kontext_8gpu") == load_config(CONFIGS / "kontext_8gpu.yaml")
    (tmp_path / "demo").write_text("data: {path: mine.jsonl}")
    assert load_config("demo", ["rewards=[{name: a, path: 'b:c'}]"]).data.path == "mine.jsonl"  # a file comes first


def test_missing_file_is_named():
    with pytest.raises(ValueError, match=r"config: no file nowhere\.yaml; expected a YAML file"):
        load_config("nowhere.yaml")
