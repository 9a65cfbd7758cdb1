"""FSDP2-sharded tiny Flux against the whole model, in two and four real processes."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from distributed_worker import run_ranks
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.tensor import DTensor

from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint
from mtedit_fast.training.distributed import assert_same, largest, process, share, sum_gradients
from mtedit_fast.training.sharding import shard

TARGETS = ["attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2", "proj_mlp"]


CONFIG = {
    "in_channels": 8,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_model(dtype, layers=(1, 2)):
    """A random Flux with a trainable adapter whose B is not zero, and a frozen one."""
    torch.manual_seed(1)
    model = FluxTransformer2DModel(**CONFIG, num_layers=layers[0], num_single_layers=layers[1]).to(dtype)
    model.requires_grad_(False)
    for name in ("default", "old"):
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False), name)
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double() if dtype == torch.float64 else parameter.data.float()
            parameter.requires_grad_(".default." in name)
    return model


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def inputs(count, dtype, text=5, tokens=16):
    generator = torch.Generator().manual_seed(2)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden_states": randn(count, tokens, CONFIG["in_channels"]),
        "encoder_hidden_states": randn(count, text, CONFIG["joint_attention_dim"]),
        "pooled_projections": randn(count, CONFIG["pooled_projection_dim"]),
        "timestep": torch.linspace(0.1, 0.9, count).to(dtype),
        "guidance": torch.full((count,), 2.5),
    }


def forward(model, batch, rows):
    dtype = batch["hidden_states"].dtype
    ids = torch.zeros(batch["hidden_states"].shape[1], 3, dtype=dtype)
    ids[:, 1] = torch.arange(len(ids)) // 4
    ids[:, 2] = torch.arange(len(ids)) % 4
    text_ids = torch.zeros(batch["encoder_hidden_states"].shape[1], 3, dtype=dtype)
    return model(**{n: t[rows] for n, t in batch.items()}, img_ids=ids, txt_ids=text_ids, return_dict=False)[0]


def base_bytes(model):
    """(bytes of the frozen base on this rank, bytes of all of it)."""
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert all(isinstance(p, DTensor) for p in frozen)
    return sum(p.to_local().nbytes for p in frozen), sum(p.numel() * p.element_size() for p in frozen)


def gradients(model):
    result = {name: parameter.grad for name, parameter in trainable(model).items()}
    for parameter in trainable(model).values():
        parameter.grad = None
    return result


def sharded_equals_whole(rank, dtype, checkpointing, compiled):
    whole = tiny_model(dtype, (1, 1) if compiled else (1, 2))
    model = copy.deepcopy(whole)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    shard(model, "cpu")
    own, total = base_bytes(model)
    assert 0.5 * total <= own <= 0.51 * total
    assert not any(isinstance(p, DTensor) for name, p in model.named_parameters() if "lora_" in name)
    assert len(trainable(model)) == len(trainable(whole)) >= 10

    batch = inputs(4, dtype)
    if compiled:  # one size, for the sake of time
        mine = [range(row, row + 1) for row in (range(3) if rank == 0 else [3])]
    else:
        mine = [range(1), range(1, 3), range(2, 3)] if rank == 0 else [range(3, 4)]
    for _ in range(2):
        with torch.no_grad():  # passes of the policy, then of the reference and the old policy, as an update has them
            assert forward(model, batch, [rank]).equal(forward(whole, batch, [rank]))
            for switch in () if compiled else (disable, use_old):
                switch(model), switch(whole)
                assert forward(model, batch, range(rank, 3)).equal(forward(whole, batch, range(rank, 3)))
                use_policy(model), use_policy(whole)
        assert base_bytes(model)[0] == own
        padding = largest(len(mine)) - len(mine)  # asked before the first forward: all ranks keep one order
        for rows in mine:
            results = []
            for each in (model, whole):
                out = forward(each, batch, rows)
                out.float().square().sum().backward()
                results.append(out.detach())
            assert (results[0] - results[1]).abs().max() <= (1e-12 if compiled else 0)
        for _ in range(padding):
            (forward(model, batch, range(1)).float().sum() * 0).backward()
        got, want = gradients(model), gradients(whole)
        for name, gradient in want.items():
            assert gradient.abs().max() > 0, name
            assert (got[name] - gradient).abs().max() <= (1e-10 if compiled else 0) * gradient.abs().max(), name
        assert base_bytes(model)[0] == own


def disable(model):
    model.disable_adapters()


def use_old(model):
    model.set_adapter("old")


def use_policy(model):
    model.enable_adapters()
    model.set_adapter("default")


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "compiled"),
    [(torch.float64, False, False), (torch.bfloat16, True, False), (torch.float64, True, True)],
)
def test_sharded_equals_whole(dtype, checkpointing, compiled):
    """Bit for bit in eager: a shard changes where weights lie, not what is computed."""
    run_ranks(2, sharded_equals_whole, dtype, checkpointing, compiled)


def train(rank, folder, start, stop, ranks):
    """Adam on 5 samples, in one forward each; sharded over `ranks` of the ranks."""
    _, world = process()
    model = tiny_model(torch.float64, (1, 1))
    shard(model, "cpu", ranks=ranks)
    if world > 1:
        frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
        local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)
        assert abs(local / sum(p.numel() for p in frozen) - 1 / ranks) <= 0.03  # dimensions of 32 over 3 ranks, too
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    if start:
        adapter, state = load_checkpoint(latest(folder), "test")
        set_peft_model_state_dict(model, adapter)
        optimizer.load_state_dict(state)
    batch = inputs(5, torch.float64)
    assert_same(get_peft_model_state_dict(model))
    for _ in range(start, stop):
        rows = share(5, rank, world)
        for index in range(largest(len(rows))):
            real = index < len(rows)
            out = forward(model, batch, [rows[index] if real else 0])
            (out.square().mean() * (1 / 5 if real else 0)).backward()
        sum_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    adapter = get_peft_model_state_dict(model)
    assert_same(adapter)
    assert all(type(value) is torch.Tensor for value in adapter.values())
    if rank == 0:
        save_checkpoint(folder, stop, adapter, optimizer.state_dict(), "test")
    return {name: value.numpy() for name, value in adapter.items()} if rank == 0 else None


def test_a_sharded_run_resumes_on_another_number_of_ranks(tmp_path):
    """Two ranks, then one, then three, then two shards of two ranks each."""
    whole = train(0, tmp_path / "whole", 0, 4, 1)
    folder = tmp_path / "moved"
    run_ranks(2, train, folder, 0, 1, 2)
    train(0, folder, 1, 2, 1)
    run_ranks(3, train, folder, 2, 3, 3)
    resumed, *_ = run_ranks(4, train, folder, 3, 4, 2)
    start = get_peft_model_state_dict(tiny_model(torch.float64, (1, 1)))
    for name, value in whole.items():
        assert abs(resumed[name] - value).max() <= 1e-9
        assert abs(start[name].numpy() - value).max() > 0.01


def test_one_process_only_moves_the_model():
    model = tiny_model(torch.float64, (1, 1))
    before = type(model)
    shard(model, "meta")
    assert type(model) is before
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_models_that_cannot_be_sharded():
    with pytest.raises(
        ValueError, match="expected blocks named by _no_split_modules or _repeated_blocks, got Linear with"
    ):
        shard(torch.nn.Linear(2, 2), "cpu")
    model = tiny_model(torch.float64, (1, 1))
    with pytest.raises(ValueError, match=r"ranks: expected a divisor of the number of ranks \(1\), got 2"):
        shard(model, "cpu", ranks=2)
    with pytest.raises(ValueError, match=r"ranks: expected a divisor of .* got -1"):
        shard(model, "cpu", ranks=-1)
    with pytest.raises(ValueError, match="expected frozen weights to shard, got blocks that are trainable throughout"):
        shard(model.requires_grad_(True), "cpu")
