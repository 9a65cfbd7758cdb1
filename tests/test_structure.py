"""The house: what imports what. Data flows one way, from training down to kernels."""

import ast
from pathlib import Path

import mtedit_fast

ROOT = Path(mtedit_fast.__file__).resolve().parent
LAYERS = (
    {"kernels"},
    {"ops"},
    {"editors", "sampling", "dropins", "qwen_vl"},
    {"rollout", "judge", "edival", "export", "onestep", "inference_time", "rewards"},
    {"training"},
)
HELPERS = {"attention", "chat_server", "cuda_graphs", "figures", "progress", "timing", "trajectories", "webpage"}
"""Of any layer; a helper imports layers below `rollout` alone, so that nothing can come back through one."""


def layer_of(name: str) -> int:
    """Of a module's name behind `mtedit_fast.`; commands are above all layers."""
    part = name.partition(".")[0]
    return next((rank for rank, layer in enumerate(LAYERS) if part in layer), len(LAYERS))


def imported(path: Path, own: str) -> set[str]:
    """Names behind `mtedit_fast.` that a file imports, wherever in it."""
    package = ["mtedit_fast", *own.split(".")][: -1 if path.name != "__init__.py" else None]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("mtedit_fast.") for name in found if name.startswith("mtedit_fast.")}


def modules() -> dict[str, Path]:
    """Files by name behind `mtedit_fast.`; kernels and training are links in a checkout."""
    found = {path.stem: path for path in ROOT.glob("*.py") if path.stem != "__main__"}
    for folder in (path for path in ROOT.iterdir() if path.is_dir()):
        for path in folder.resolve().rglob("*.py"):
            parts = (folder.name, *path.relative_to(folder.resolve()).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def test_data_flows_one_way():
    files = modules()
    assert {"kernels.sde_step", "training.judge.trainer", "ops", "rollout"} <= files.keys()
    wrong = []
    for own, path in files.items():
        for name in imported(path, own):
            part = name.partition(".")[0]
            lower = "rollout" if own in HELPERS else own
            above = layer_of(name) > layer_of(lower) or (own in HELPERS and layer_of(name) == layer_of(lower))
            if part not in HELPERS and above and part in {each.partition(".")[0] for each in files}:
                wrong.append(f"{own} imports {name}")
    assert not wrong
