"""Without a GPU: what would run on one, run on a device that pretends to be one; see pretend_gpu/__main__.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a real CUDA in it")

PRETENCE = """
import pytest, torch
from mtedit_fast.cuda_graphs import CapturedCall

x, y = torch.arange(6.0, device="cuda").view(2, 3), torch.ones(2, 3)
assert (x.is_cuda, (x @ x.T).device, x.cpu().device) == (True, torch.device("cuda", 0), torch.device("cpu"))
assert torch.equal((x * torch.tensor(2.0)).cpu(), torch.arange(6.0).view(2, 3) * 2)  # scalars of the CPU may mix in
for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: x.mv(y[0])):
    with pytest.raises(RuntimeError, match="same device"):
        mixed()
layer = torch.nn.Linear(3, 2).cuda()
layer(x).square().sum().backward()
assert layer.weight.grad.is_cuda
with pytest.raises(TypeError, match="numpy"):
    x.numpy()

torch.cuda.set_sync_debug_mode("error")
for waits in (
    lambda: x.sum().item(),
    lambda: x.tolist(),
    lambda: x[x > 1],
    lambda: x[:, torch.tensor([0, 2])],
    lambda: y.cuda(),
    lambda: torch.tensor([1.0], device="cuda"),
    lambda: bool(x.any()),
    lambda: x.cpu(),
):
    with pytest.raises(RuntimeError, match="synchronizing"):
        waits()
y.pin_memory().to("cuda", non_blocking=True)
torch.where(x > 1, x, 0.0)[:, :2] = 3
torch.cuda.set_sync_debug_mode("default")

call = CapturedCall(lambda tree: (tree["x"] * 2).exp_().sum(1), {"x": x})
assert call.out.isnan().all()  # recorded, not run
for values in (x, x + 1):
    call.inputs[0].load({"x": values})
    assert torch.equal(call(), (values * 2).exp().sum(1))
with pytest.raises(RuntimeError, match="capturing"):
    CapturedCall(lambda tree: tree["x"] * tree["x"].max().item(), {"x": x})
"""


def pretended(*arguments: str | Path) -> None:
    result = subprocess.run(
        [sys.executable, HERE / "pretend_gpu", *arguments], capture_output=True, text=True, cwd=HERE
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_it_refuses_what_a_gpu_refuses(tmp_path):
    (tmp_path / "pretence.py").write_text(PRETENCE)
    pretended(tmp_path / "pretence.py")


@pytest.mark.parametrize(
    ("files", "chosen"),
    [("on_gpu", ""), ("speed rewards onestep_sampling trainer", "(graph or stream or ratio) and not compiled")],
)
def test_what_runs_on_a_gpu(files, chosen):
    paths = [HERE / f"test_{name}.py" for name in files.split()]
    pretended("pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", chosen, *paths)
