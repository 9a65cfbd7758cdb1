"""Which steps a window makes stochastic."""

import numpy as np
import pytest
import torch

from mtedit_fast.sampling import progressive_window, sde_window


def test_sde_window():
    starts = {sde_window(10, 3, 1, 8, seed=seed).start for seed in range(200)}
    assert starts == {1, 2, 3, 4, 5}  # uniform in [lo, hi - size]
    assert all(len(sde_window(10, 3, 1, 8, seed=seed)) == 3 for seed in range(20))
    assert sde_window(10, 3, 1, 8, seed=4) == sde_window(10, 3, 1, 8, seed=4)
    assert sde_window(5, 4, seed=0) == range(4)  # all but the last step
    generator = torch.Generator().manual_seed(0)
    assert len({sde_window(50, 2, seed=generator).start for _ in range(30)}) > 10
    counts = np.bincount([sde_window(6, 2, seed=seed).start for seed in range(2000)], minlength=4)
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # χ², 3 degrees of freedom, p = 0.001


def test_progressive_window():
    windows = [progressive_window(i, 25, 4, iterations_per_window=25) for i in range(25 * 30)]
    assert windows[:25] == [range(4)] * 25
    assert windows[25] == range(1, 5)  # MixGRPO's overlap: one step further
    assert windows[-1] == range(20, 24)  # held at the last full window before the ODE step
    assert [w.start for w in windows] == sorted(w.start for w in windows)
    assert progressive_window(3, 25, 4, iterations_per_window=1, stride=4, lo=2, hi=20) == range(14, 18)
    assert progressive_window(99, 25, 4, iterations_per_window=1, stride=4, lo=2, hi=20) == range(16, 20)


@pytest.mark.parametrize("window", [lambda *a: sde_window(*a, seed=0), lambda *a: progressive_window(0, *a)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1), "num_steps must be at least 2"),
        ((10, 0), "size must be between 1 and hi - lo = 9, got 0"),
        ((10, 10), "size must be between 1 and hi - lo = 9, got 10"),
    ],
)
def test_window_errors(window, arguments, message):
    with pytest.raises(ValueError, match=message):
        window(*arguments)


def test_window_range_errors():
    with pytest.raises(ValueError, match=r"hi <= num_steps - 1 = 9 .*got lo=0, hi=10"):
        sde_window(10, 2, 0, 10, seed=0)
    with pytest.raises(ValueError, match=r"0 <= lo < hi .*got lo=5, hi=5"):
        progressive_window(0, 10, 2, lo=5, hi=5)
    with pytest.raises(ValueError, match="iteration must be 0 or more, got -1"):
        progressive_window(-1, 10, 2)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        progressive_window(0, 10, 2, iterations_per_window=0)
