"""Shared, cached and batched scores against the plain model on one sequence at a time."""

import copy

import judge_truth as truth
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2VLImageProcessorPil,
)

from mtedit_fast.judge import HuggingFaceJudge, JudgePrompt
from mtedit_fast.judge.attention import VARLEN
from mtedit_fast.judge.prefill import new_group
from mtedit_fast.judge.sequence import split_question
from mtedit_fast.qwen_vl import encode_images
from mtedit_fast.training.playground.judge_model import IMAGES

PROMPT = JudgePrompt(rubric="Score each edit.")
TOKENIZER = truth.TOKENIZER
FAMILIES = {
    "qwen3_vl": truth.qwen3,
    "untied": lambda: truth.qwen3(tied=False),
    "qwen2_vl": lambda: truth.qwen2("qwen2_vl"),
    "qwen2_5_vl": lambda: truth.qwen2("qwen2_5_vl"),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def stock():
    """Models that no judge has touched."""
    return {name: make() for name, make in FAMILIES.items()}


def judge_of(model, spec=IMAGES, prompt=PROMPT, **options):
    return HuggingFaceJudge(copy.deepcopy(model), TOKENIZER, spec, prompt, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_scores_are_those_of_the_plain_model(stock, family, turns, share_prefix):
    references, edits, instructions, owner = inputs = truth.group_inputs(3, 2, turns)
    expected = truth.plain_scores(stock[family], PROMPT, IMAGES, *inputs)
    assert expected.std() > 0.05  # else this shows nothing
    judge = judge_of(stock[family], share_prefix=share_prefix)
    result = judge.score(references, edits, instructions, owner=owner)
    close(result.score, expected)
    assert result.failures == {}
    assert result.answers is None
    assert judge.counts["images"] == 3 + 6 * turns  # a reference once, an edit once
    assert judge.counts["prefixes"] == (3 if share_prefix else 0)
    assert judge.counts["forwards"] == (2 if share_prefix else 1)
    again = judge.score(references, edits, instructions, owner=owner)
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(result[:5], again[:5], strict=True))


@pytest.mark.parametrize("turns", [1, 2])
def test_sizes_that_differ_from_group_to_group(stock, turns):
    generator = torch.Generator().manual_seed(4)
    sizes = [(64, 64), (40, 100), (64, 64), (90, 33)]
    owner = [3, 0, 1, 3, 2, 1, 0]
    references = [torch.rand(3, *size, generator=generator) for size in sizes]
    edits = [torch.rand(turns, 3, *sizes[i], generator=generator) for i in owner]
    edits[5] = torch.rand(turns, 3, 48, 64, generator=generator)  # as some editors resize
    instructions = [[truth.TEXTS[(i + k) % 4] for k in range(turns)] for i in owner]
    expected = truth.plain_scores(stock["qwen3_vl"], PROMPT, truth.ANY_SIZE, references, edits, instructions, owner)
    judge = judge_of(stock["qwen3_vl"], truth.ANY_SIZE)
    close(judge.score(references, edits, instructions, owner=owner).score, expected)
    assert judge.counts["images"] == 4 + 7 * turns
    assert judge.counts["prefixes"] == 2  # of the two groups with two members of one size


@pytest.mark.parametrize("max_tokens", [1, 150, 300])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_budget_changes_no_score(stock, max_tokens, share_prefix):
    references, edits, instructions, owner = inputs = truth.group_inputs(3, 3, 2)
    judge = judge_of(stock["qwen3_vl"], max_tokens=max_tokens, share_prefix=share_prefix)
    result = judge.score(references, edits, instructions, owner=owner)
    close(result.score, truth.plain_scores(stock["qwen3_vl"], PROMPT, IMAGES, *inputs))
    assert judge.counts["images"] == 3 + 9 * 2
    assert judge.counts["prefixes"] == (3 if share_prefix else 0)
    assert judge.counts["rows"] == 9
    assert judge.counts["forwards"] > (2 if share_prefix else 1)


def test_a_shuffled_batch_has_shuffled_scores(stock):
    references, edits, instructions, owner = truth.group_inputs(3, 3, 2)
    judge = judge_of(stock["qwen3_vl"], max_tokens=500)
    expected = judge.score(references, edits, instructions, owner=owner).score
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    swap = [2, 0, 1]  # references[swap[i]] comes i-th
    result = judge.score(
        references[swap],
        edits[order],
        [instructions[row] for row in order],
        owner=[swap.index(owner[row]) for row in order],
    )
    close(result.score, expected[order])
    assert judge.counts["prefixes"] == 3
    assert expected.unique().numel() == expected.numel()


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16])
def test_identical_references_are_a_group(stock, kind):
    references, edits, instructions, owner = truth.group_inputs(2, 3, 1)
    if kind == torch.uint8:
        references, edits = (references * 255).to(kind), (edits * 255).to(kind)
    references, edits = references.to(kind), edits.to(kind)
    judge = judge_of(stock["qwen3_vl"])
    expected = judge.score(references, edits, instructions, owner=owner)
    result = judge.score(references[owner], edits, instructions)
    assert judge.counts["images"] == 2 + 6
    assert judge.counts["prefixes"] == 2
    assert torch.equal(result.score, expected.score)
    permuted = references[owner].clone()
    permuted[1] = permuted[1].flip(-1)  # the same bits in another order
    judge.score(permuted, edits, instructions)
    assert judge.counts["images"] == 3 + 6


def test_other_instructions_are_another_group_with_the_same_reference(stock):
    references, edits, instructions, owner = truth.group_inputs(1, 4, 1)
    instructions[2:] = [["Remove the circle"]] * 2
    judge = judge_of(stock["qwen3_vl"], max_tokens=100)  # a forward per group, and still one encoding
    result = judge.score(references, edits, instructions, owner=owner)
    close(result.score, truth.plain_scores(stock["qwen3_vl"], PROMPT, IMAGES, references, edits, instructions, owner))
    assert judge.counts["images"] == 1 + 4
    assert judge.counts["prefixes"] == 2


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "qwen2_5_vl"])
def test_positions_are_those_of_the_whole_sequence(stock, family):
    model = stock[family]
    sizes = [(64, 64), (40, 90), (33, 33), (96, 32)]
    grids = [truth.ANY_SIZE.grid(*size) for size in sizes]
    tokens = [truth.ANY_SIZE.tokens(*size) for size in sizes]
    question = split_question(TOKENIZER, PROMPT, truth.TEXTS[:3], tokens, image_token="<|image_pad|>")
    group = new_group(model, question, grids, 0, [0])
    trunk = len(question.prefix) + len(question.tail)
    start = trunk
    assert [len(branch) for branch in question.branches] == [1, 1, 1]
    for number, branch in enumerate(question.branches):
        ids = torch.tensor([question.prefix + question.tail + branch])
        expected, _ = model.model.get_rope_index(
            ids, (ids == model.config.image_token_id).int(), image_grid_thw=torch.tensor(grids)
        )
        own = torch.cat([group.positions[:, :trunk], group.positions[:, start : start + len(branch)]], 1)
        assert torch.equal(own, expected[:, 0])
        start += len(branch)
        assert group.ends[number] == start - len(question.prefix) - 1


@pytest.mark.parametrize("scale", ["0-5", "binary", "yes_no"])
def test_other_scales(stock, scale):
    prompt = JudgePrompt(scale, rubric="Score each edit.")
    inputs = truth.group_inputs(2, 2, 2)
    result = judge_of(stock["qwen3_vl"], prompt=prompt).score(*inputs[:3], owner=inputs[3])
    close(result.score, truth.plain_scores(stock["qwen3_vl"], prompt, IMAGES, *inputs))
    assert result.score.max() <= max(prompt.answers.values)


@pytest.mark.parametrize("normalize", ["set", "vocab"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("family", ["qwen3_vl", "untied"])
def test_all_statistics(stock, normalize, temperature, family):
    references, edits, instructions, owner = truth.group_inputs(2, 1, 2)
    result = judge_of(stock[family], normalize=normalize, temperature=temperature).score(
        references, edits, instructions, owner=owner
    )
    ids = TOKENIZER.convert_tokens_to_ids(list("12345"))
    values = torch.arange(1, 6).double()
    for row in range(2):
        logits = truth.plain_logits(
            stock[family], PROMPT, IMAGES, references[row], edits[row], instructions[row]
        ).double()
        within = (logits / temperature).softmax(1)[:, ids]
        q = within / within.sum(1, keepdim=True)
        mean = q @ values
        close(result.score[row].double(), mean if normalize == "set" else within @ values)
        torch.testing.assert_close(result.variance[row].double(), q @ values**2 - mean**2, rtol=0, atol=5e-5)
        close(result.entropy[row].double(), -(q * q.log()).nansum(1))
        median = [values[int((own.cumsum(0) < 0.5).sum())].item() for own in q]
        assert result.median[row].tolist() == median
        if normalize == "vocab":
            close(result.mass[row].double(), within.sum(1))
        else:
            assert result.mass.isnan().all()


def test_scores_below_the_least_mass_are_counted(stock):
    inputs = truth.group_inputs(2, 3, 2)
    every = judge_of(stock["qwen3_vl"], normalize="vocab").score(*inputs[:3], owner=inputs[3])
    limit = every.mass.flatten().sort().values[4:6].mean().item()
    light = every.mass < limit
    assert light.sum() == 5
    result = judge_of(stock["qwen3_vl"], normalize="vocab", min_mass=limit).score(*inputs[:3], owner=inputs[3])
    assert result.failures == {"mass": 5}
    for field, full in zip(result[:5], every[:5], strict=True):
        assert torch.equal(field.isnan(), light)
        assert torch.equal(field[~light], full[~light])


def test_eager_attention(stock):
    model = copy.deepcopy(stock["qwen3_vl"])
    model.set_attn_implementation("eager")
    inputs = truth.group_inputs(2, 2, 3)
    result = HuggingFaceJudge(model, TOKENIZER, IMAGES, PROMPT).score(*inputs[:3], owner=inputs[3])
    close(result.score, truth.plain_scores(stock["qwen3_vl"], PROMPT, IMAGES, *inputs))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "qwen2_5_vl"])
def test_images_attend_in_one_call_as_they_do_one_by_one(stock, family):
    model = judge_of(stock[family]).model
    assert model.model.visual.config._attn_implementation == VARLEN != "sdpa"
    assert stock[family].model.visual.config._attn_implementation == "sdpa"
    sizes = [[(64, 64)] * 3, [(64, 64), (40, 90), (64, 64), (32, 32)]]
    for shapes in sizes:
        grid = torch.tensor([truth.ANY_SIZE.grid(*size) for size in shapes])
        patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, theirs = (encode_images(m, patches, grid) for m in (model, stock[family]))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_exact_as_the_plain_model_in_bf16(stock):
    references, edits, instructions, owner = inputs = truth.group_inputs(4, 4, 2)
    expected = truth.plain_scores(stock["qwen3_vl"], PROMPT, IMAGES, *inputs)
    rounded = copy.deepcopy(stock["qwen3_vl"]).bfloat16()
    plain = truth.plain_scores(rounded, PROMPT, IMAGES, *inputs)
    ours = judge_of(rounded).score(references, edits, instructions, owner=owner).score
    assert (ours - expected).abs().mean() <= 1.5 * (plain - expected).abs().mean()


def test_lora(stock):
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(stock["qwen3_vl"]), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    inputs = truth.group_inputs(2, 2, 2)
    result = HuggingFaceJudge(adapted, TOKENIZER, IMAGES, PROMPT).score(*inputs[:3], owner=inputs[3])
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = truth.plain_scores(merged, PROMPT, IMAGES, *inputs)
    torch.testing.assert_close(result.score, expected, rtol=0, atol=1e-4)  # merging rounds the weights
    assert not torch.allclose(expected, truth.plain_scores(stock["qwen3_vl"], PROMPT, IMAGES, *inputs), atol=1e-2)


def test_from_a_folder(stock, tmp_path):
    stock["qwen3_vl"].save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(
        patch_size=8,
        size={"shortest_edge": IMAGES.min_pixels, "longest_edge": IMAGES.max_pixels},
        image_mean=list(IMAGES.mean),
        image_std=list(IMAGES.std),
    ).save_pretrained(tmp_path)
    inputs = truth.group_inputs(1, 2, 1)
    judge = HuggingFaceJudge.from_pretrained(
        str(tmp_path), prompt=PROMPT, dtype=torch.float32, device="cpu", attn_implementation="eager", normalize="vocab"
    )
    assert judge.images == IMAGES
    assert judge.model.config.text_config._attn_implementation == "eager"
    expected = judge_of(stock["qwen3_vl"], normalize="vocab").score(*inputs[:3], owner=inputs[3])
    close(judge.score(*inputs[:3], owner=inputs[3]).score, expected.score)
