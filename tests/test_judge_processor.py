"""Models of other families, judged through their own processor, against transformers one question at a time."""

import judge_truth as truth
import pytest
import torch
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mtedit_fast.judge import HuggingFaceJudge, ImageSpec, JudgePrompt, sample_answers
from mtedit_fast.training.playground.judge_model import new_judge_tokenizer

PROMPT = JudgePrompt(rubric="Score each edit.")


def llava():
    tokenizer = new_judge_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"),
    )
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "projection_dim": 32, **size}
    tokens = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 1, **size, **tokens}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return truth.spread(LlavaForConditionalGeneration(config)), processor


def llava_question(processor, prompt, reference, edits, texts, opening=""):
    text = processor.apply_chat_template(prompt.messages(texts), tokenize=False, add_generation_prompt=True)
    images = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in (reference, *edits)]
    return processor(text=text + opening, images=images, return_tensors="pt")


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_of_another_family_through_its_processor(side):
    model, processor = llava()
    processor.tokenizer.padding_side = side
    references, edits, instructions, owner = truth.group_inputs(2, 2, 2)
    expected = torch.empty(4, 2)
    ids = processor.tokenizer.convert_tokens_to_ids(list("12345"))
    for row, i in enumerate(owner):
        for turn in range(2):
            inputs = llava_question(
                processor, PROMPT, references[i], edits[row], instructions[row], f"<Turn{turn + 1}Score>"
            )
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            expected[row, turn] = logits[ids].softmax(0) @ torch.arange(1, 6.0)
    assert expected.std() > 0.02
    judge = HuggingFaceJudge(model, processor.tokenizer, processor, PROMPT, max_tokens=500)
    result = judge.score(references, edits, instructions, owner=owner)
    torch.testing.assert_close(result.score, expected, rtol=0, atol=1e-5)
    assert 1 < judge.counts["forwards"] < 8
    assert torch.equal(judge.score(references, edits, instructions, owner=owner).score, result.score)


@pytest.mark.parametrize("side", ["right", "left"])
def test_written_answers_of_a_model_of_another_family(side):
    model, processor = llava()
    processor.tokenizer.padding_side = side
    prompt = JudgePrompt(thinking=True, rubric="Score each edit.")
    references, edits, instructions, _ = truth.group_inputs(2, 1, 1)
    judge = HuggingFaceJudge(model, processor.tokenizer, processor, prompt, temperature=0, max_new_tokens=5, samples=2)
    result = judge.score(references, edits, instructions)
    for row in range(2):
        inputs = llava_question(processor, prompt, references[row], edits[row], instructions[row])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        assert result.answers[row] == [processor.tokenizer.decode(ids, skip_special_tokens=True)] * 2
        again = sample_answers(model, processor.tokenizer, inputs, temperature=0, max_new_tokens=5)
        assert again == [[ids.tolist()]]
    assert result.failures == {"parse": 4}


def test_from_a_folder_of_another_family(tmp_path):
    model, processor = llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    judge = HuggingFaceJudge.from_pretrained(str(tmp_path), prompt=PROMPT, device="cpu")
    assert not isinstance(judge.images, ImageSpec)
    inputs = truth.group_inputs(1, 1, 1)
    expected = HuggingFaceJudge(model, processor.tokenizer, processor, PROMPT).score(*inputs[:3])
    torch.testing.assert_close(judge.score(*inputs[:3]).score, expected.score, rtol=0, atol=1e-5)
