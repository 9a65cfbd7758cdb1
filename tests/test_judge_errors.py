"""Bad input to a judge: a clear error, or NaN for what is concerned, counted, and every other score as it would be."""

import copy

import judge_truth as truth
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLImageProcessorPil

from mtedit_fast.judge import HuggingFaceJudge, ImageSpec, JudgePrompt
from mtedit_fast.training.playground.judge_model import IMAGES

PROMPT = JudgePrompt(rubric="Score each edit.")
TOKENIZER = truth.TOKENIZER


@pytest.fixture(scope="module")
def model():
    return truth.qwen3()


@pytest.fixture
def judge(model):
    return HuggingFaceJudge(model, TOKENIZER, IMAGES, PROMPT)


def wrong(**changes):
    references, edits, instructions, owner = truth.group_inputs(2, 2, 2)
    arguments = {"references": references, "edits": edits, "instructions": instructions, "owner": owner}
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


def without_last_turn(instructions):
    return [*instructions[:3], instructions[3][:1]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"instructions": lambda x: x[:3]}, ValueError, "instructions must be 4 lists, one per row of edits, got 3"),
        ({"instructions": without_last_turn}, ValueError, r"instructions\[3\] must be 2 texts.*got 1"),
        (
            {"instructions": lambda x: [*x[:3], [*x[3], "more"]]},
            ValueError,
            r"instructions\[3\] must be 2 texts.*got 3",
        ),
        ({"instructions": lambda x: [*x[:3], "ab"]}, ValueError, r"instructions\[3\] must be 2 texts.*got 'ab'"),
        ({"instructions": lambda x: [x[0], ["x", " "], *x[2:]]}, ValueError, r"instructions\[1\]\[1\].*got ' '"),
        ({"instructions": lambda x: [x[0], ["x", None], *x[2:]]}, ValueError, r"instructions\[1\]\[1\].*got None"),
        ({"edits": lambda x: x[:3]}, ValueError, "owner must be 3 indices of 2 references"),
        ({"edits": lambda x: x[:, :1]}, ValueError, r"instructions\[0\] must be 1 texts"),
        ({"edits": lambda x: x[:, 0]}, ValueError, r"edits\[0\] must be \[K, 3, H, W\] with pixels, got \[3, 64, 64\]"),
        ({"edits": lambda x: x[:, :, :1]}, ValueError, r"edits\[0\] must be \[K, 3, H, W\]"),
        ({"edits": lambda x: x[..., :0]}, ValueError, r"edits\[0\] must be .* with pixels"),
        ({"edits": lambda x: (x * 255).int()}, TypeError, r"edits\[0\] must be a uint8 or floating-point tensor"),
        ({"edits": lambda x: [*x[:3], None]}, TypeError, r"edits\[3\] must be .* got NoneType"),
        (
            {"edits": lambda x: [*x[:3], x[3][:1]], "instructions": without_last_turn},
            ValueError,
            r"edits\[3\] must have",
        ),
        ({"edits": lambda x: [*x[:3], x[3].to("meta")]}, ValueError, "must be on one device, got .*cpu.*meta"),
        ({"references": lambda x: x[:, :2]}, ValueError, r"references\[0\] must be \[3, H, W\]"),
        ({"references": lambda x: x.tolist()}, TypeError, r"references\[0\] must be .* got list"),
        (
            {"owner": lambda x: None},
            ValueError,
            "references must be as many as the 4 rows of edits without owner=, got 2",
        ),
        ({"owner": lambda x: [0, 0, 1, 2]}, ValueError, "owner must be 4 indices of 2 references"),
        ({"owner": lambda x: [0, 0, 1, -1]}, ValueError, "owner must be 4 indices of 2 references"),
    ],
)
def test_arguments_that_do_not_fit_together(judge, changes, error, message):
    with pytest.raises(error, match=message):
        judge.score(**wrong(**changes))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("thinking", [False, True])
def test_rows_with_broken_pixels_are_nan_and_counted(model, bad, thinking):
    prompt = JudgePrompt(thinking=thinking, rubric="Score each edit.")
    judge = HuggingFaceJudge(model, TOKENIZER, IMAGES, prompt, max_new_tokens=3)
    references, edits, instructions, owner = truth.group_inputs(3, 2, 2)
    expected = judge.score(references, edits, instructions, owner=owner)
    edits[1, 0, 2, 5, 7] = bad
    references[2, 0, 0, 0] = bad
    result = judge.score(references, edits, instructions, owner=owner)
    broken = [1, 4, 5]
    assert result.failures.pop("image") == 6
    assert all(field[broken].isnan().all() for field in result[:5])
    if thinking:
        assert result.failures == {"parse": 3}
        assert [len(own) for own in result.answers] == [1, 0, 1, 1, 0, 0]
    else:
        assert result.failures == {}
        torch.testing.assert_close(result.score[[0, 2, 3]], expected.score[[0, 2, 3]], rtol=0, atol=1e-5)
    assert judge.counts["images"] == 2 + 6


def test_nothing_but_broken_pixels(judge):
    references, edits, instructions, owner = truth.group_inputs(1, 2, 1)
    result = judge.score(references * torch.nan, edits, instructions, owner=owner)
    assert result.failures == {"image": 2}
    assert result.score.isnan().all()
    assert judge.counts["forwards"] == 0


def test_no_rows(judge):
    references, edits, _, _ = truth.group_inputs(1, 1, 3)
    result = judge.score(references, edits[:0], [], owner=[])
    assert all(field.shape == (0, 3) for field in result[:5])
    assert result.failures == {}
    assert judge.score([], [], []).score.shape == (0, 0)


def test_scores_that_come_out_as_nan_are_counted(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        embedding = broken.get_input_embeddings().weight
        embedding[TOKENIZER.convert_tokens_to_ids("ocean")] = torch.nan  # what overflow in a low precision does
    references, edits, instructions, owner = truth.group_inputs(2, 2, 1)
    instructions[0] = instructions[1] = ["Change the background to ocean"]
    head = torch.nn.Linear(128, broken.config.text_config.vocab_size, bias=False)
    broken.set_output_embeddings(head)
    result = HuggingFaceJudge(broken, TOKENIZER, IMAGES, PROMPT).score(references, edits, instructions, owner=owner)
    assert result.failures == {"model": 2}
    assert all(field[:2].isnan().all() for field in result[:5])
    assert result.score[2:].isfinite().all()


@pytest.mark.parametrize("thinking", [False, True])
def test_out_of_memory_halves_the_budget_once(model, thinking):
    prompt = JudgePrompt(thinking=thinking, rubric="Score each edit.")
    greedy = {"temperature": 0, "max_new_tokens": 2} if thinking else {}
    own = copy.deepcopy(model)
    references, edits, instructions, owner = truth.group_inputs(2, 3, 2)
    judge = HuggingFaceJudge(own, TOKENIZER, IMAGES, prompt, max_tokens=1200, **greedy)
    expected = judge.score(references, edits, instructions, owner=owner)
    calls = []

    def exhausted(module, args, kwargs):
        calls.append(kwargs["inputs_embeds"].shape)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    own.model.language_model.register_forward_pre_hook(exhausted, with_kwargs=True)
    failing = {2}
    with pytest.warns(UserWarning, match="max_tokens is now 600 instead of 1200"):
        result = judge.score(references, edits, instructions, owner=owner)
    assert judge.max_tokens == 600
    assert judge.counts["prefixes"] == 2
    torch.testing.assert_close(result.score, expected.score, rtol=0, atol=1e-5, equal_nan=True)
    assert result.answers == expected.answers
    calls.clear()
    failing = set(range(9))
    with pytest.warns(UserWarning, match="max_tokens is now 300"), pytest.raises(torch.OutOfMemoryError):
        judge.score(references, edits, instructions, owner=owner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "all"}, "normalize must be 'set' or 'vocab'"),
        ({"min_mass": 0.5}, "min_mass=0.5 needs normalize='vocab'"),
        ({"min_mass": 1.5, "normalize": "vocab"}, "min_mass must be within 0…1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0, "prompt": JudgePrompt(thinking=True)}, "temperature must be positive"),
        ({"samples": 0}, "samples must be >= 1"),
        ({"max_tokens": 0}, "max_tokens must be >= 1"),
        ({"images": ImageSpec()}, r"images: expected the model's patch.*\(8, 2, 2\), got \(16, 2, 2\)"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceJudge(model, TOKENIZER, **{"images": IMAGES, "prompt": PROMPT, **options})


def test_models_that_cannot_be_judges(model):
    with pytest.raises(TypeError, match="images must be an ImageSpec or the model's processor, got Qwen2VLImage"):
        HuggingFaceJudge(model, TOKENIZER, Qwen2VLImageProcessorPil(), PROMPT)
    own = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        HuggingFaceJudge(own.train(), TOKENIZER, IMAGES, PROMPT).score(*truth.group_inputs(1, 1, 1)[:3])
    own.eval().config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa' and 'eager' take, got 'flash_attention_2'"):
        HuggingFaceJudge(own, TOKENIZER, IMAGES, PROMPT)
    own.config.text_config._attn_implementation = "sdpa"
    own.config.text_config.layer_types = ["full_attention", "sliding_attention"] * 3
    with pytest.raises(ValueError, match="other families are judged through their processor"):
        HuggingFaceJudge(own, TOKENIZER, IMAGES, PROMPT)


def test_heads_that_are_more_than_a_weight(model):
    adapted = get_peft_model(truth.qwen3(tied=False), LoraConfig(target_modules=["lm_head"])).eval()
    with pytest.raises(ValueError, match="expected a plain linear head, got Linear; merge its adapter"):
        HuggingFaceJudge(adapted, TOKENIZER, IMAGES, PROMPT)
    capped = copy.deepcopy(model)
    capped.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0"):
        HuggingFaceJudge(capped, TOKENIZER, IMAGES, PROMPT)
    HuggingFaceJudge(capped, TOKENIZER, IMAGES, JudgePrompt(thinking=True))  # goes through the head itself


def test_a_tokenizer_that_does_not_fit(model):
    from test_judge_prompts import byte_level

    with pytest.raises(ValueError, match="choose a scale of single tokens"):
        HuggingFaceJudge(model, byte_level(), IMAGES, JudgePrompt("yes_no"))
    blind = copy.deepcopy(TOKENIZER)
    blind.chat_template = "{% for message in messages %}{{ message.role }}{% endfor %}"
    references, edits, instructions, owner = truth.group_inputs(1, 1, 1)
    with pytest.raises(ValueError, match="must take images"):
        HuggingFaceJudge(model, blind, IMAGES, PROMPT).score(references, edits, instructions, owner=owner)
