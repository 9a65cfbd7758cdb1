"""Sampled answers against transformers' generate, against the model's probabilities, and read by a thinking judge."""

import math

import judge_truth as truth
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from mtedit_fast.judge import HuggingFaceJudge, JudgePrompt, parse_answer, prepare_images, sample_answers, write_answer
from mtedit_fast.judge.sampling import stops
from mtedit_fast.judge.sequence import encode
from mtedit_fast.training.playground.judge_model import IMAGES

TOKENIZER = truth.TOKENIZER
THINKING = JudgePrompt(thinking=True, rubric="Score each edit.")
IMAGE = TOKENIZER.convert_tokens_to_ids("<|image_pad|>")


def questions(turns=1, count=2, side="right"):
    """Model inputs of questions of different lengths, padded; and those of each alone."""
    references, edits, _, _ = truth.group_inputs(count, 1, turns)
    alone = []
    for row in range(count):
        texts = [truth.TEXTS[(row + turn) % 2] for turn in range(turns)]
        ids, _ = encode(TOKENIZER, THINKING, texts, [16] * (turns + 1), image_token="<|image_pad|>")
        patches, grid = prepare_images([references[row], *edits[row]], IMAGES)
        ids = torch.tensor([ids])
        alone.append(
            {
                "input_ids": ids,
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": patches,
                "image_grid_thw": grid,
            }
        )

    def padded(rows):
        rows = [row.flip(0) for row in rows] if side == "left" else rows
        batch = pad_sequence(rows, batch_first=True)
        return batch.flip(1) if side == "left" else batch

    ids = padded([inputs["input_ids"][0] for inputs in alone])
    together = {
        "input_ids": ids,
        "attention_mask": padded([torch.ones_like(inputs["input_ids"][0]) for inputs in alone]),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([inputs["pixel_values"] for inputs in alone]),
        "image_grid_thw": torch.cat([inputs["image_grid_thw"] for inputs in alone]),
    }
    return together, alone


@pytest.fixture(scope="module")
def model():
    return truth.qwen3()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("turns", [1, 2])
def test_the_likeliest_tokens_are_those_of_generate(model, turns, side):
    together, alone = questions(turns, side=side)
    answers = sample_answers(model, TOKENIZER, together, n=2, temperature=0, max_new_tokens=12)
    for own, inputs in zip(answers, alone, strict=True):
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].tolist()
        assert own == [ids, ids]


def test_given_positions_are_used(model):
    """Positions three times as far apart: a model that sees them so writes something else."""
    _, (inputs, _) = questions()
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    positions = 3 * model.model.get_rope_index(ids, types, image_grid_thw=inputs["image_grid_thw"])[0]
    ((own,),) = sample_answers(model, TOKENIZER, inputs | {"position_ids": positions}, temperature=0, max_new_tokens=6)
    steps = positions.max() + torch.arange(1, 7)
    whole = inputs | {
        "input_ids": torch.cat([ids, torch.tensor([own])], 1),
        "mm_token_type_ids": torch.cat([types, torch.zeros(1, 6, dtype=types.dtype)], 1),
        "position_ids": torch.cat([positions, steps.expand(3, 1, -1)], 2),
    }
    with torch.no_grad():
        likeliest = model(**whole).logits[0, ids.shape[1] - 1 : -1].argmax(1)
    assert own == likeliest.tolist()
    assert own != sample_answers(model, TOKENIZER, inputs, temperature=0, max_new_tokens=6)[0][0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.5, 0.6)])
def test_tokens_are_drawn_with_the_models_probabilities(model, temperature, top_p):
    _, (inputs, _) = questions()
    n = 2000
    generator = torch.Generator().manual_seed(0)
    answers = sample_answers(
        model, TOKENIZER, inputs, n=n, temperature=temperature, top_p=top_p, max_new_tokens=1, generator=generator
    )
    with torch.no_grad():
        p = (model(**inputs).logits[0, -1].double() / temperature).softmax(0)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= top_p]] = 0
    p /= p.sum()
    drawn = torch.bincount(torch.tensor([ids[0] for ids in answers[0]]), minlength=len(p)) / n
    assert (p == 0).sum() > 10 or top_p == 1
    assert drawn[p == 0].sum() == 0
    # A bound on each frequency that all of them exceed with a probability below 1e-5.
    assert ((drawn - p).abs() <= 5.5 * (p * (1 - p) / n).sqrt() + 8 / n).all()


def test_the_generators_state_decides(model):
    together, _ = questions()

    def sampled(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_answers(model, TOKENIZER, together, n=3, max_new_tokens=8, generator=generator)

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    torch.manual_seed(3)
    first = sample_answers(model, TOKENIZER, together, n=2, max_new_tokens=4)
    torch.manual_seed(3)
    assert sample_answers(model, TOKENIZER, together, n=2, max_new_tokens=4) == first


def test_an_answer_ends_at_its_stop_and_the_others_do_not_notice(model):
    together, _ = questions()

    def sampled(stop):
        generator = torch.Generator().manual_seed(5)
        options = {"n": 4, "temperature": 2.0, "max_new_tokens": 24, "generator": generator}
        answers = sample_answers(model, TOKENIZER, together, stop=stop, **options)
        return [ids for own in answers for ids in own]

    whole = sampled(())
    words = [TOKENIZER.decode([ids[2]]).strip() for ids in whole]
    stop = next(word for word in words if word)
    cut = sampled((stop,))
    ends = [next((i + 1 for i in range(len(ids)) if stop in TOKENIZER.decode(ids[: i + 1])), len(ids)) for ids in whole]
    assert cut == [ids[:end] for ids, end in zip(whole, ends, strict=True)]
    assert min(ends) < max(ends)
    nothing_more = sampled((stop, "a text that never comes"))
    assert nothing_more == whole


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_bad_options(model, options):
    _, (inputs, _) = questions()
    with pytest.raises(ValueError, match=next(iter(options))):
        sample_answers(model, TOKENIZER, inputs, **options)


def test_stops():
    assert stops(THINKING, 1) == ["</Thought>", "</Score>"]
    assert stops(JudgePrompt(thinking=True), 3) == ["</Thought>", "</Turn3Score>"]
    assert stops(JudgePrompt(), 2) == ["</Turn2Score>"]


ANSWERS = {
    1: [write_answer("2", "partly done"), write_answer("5", "done"), write_answer("9", "done"), "<Score>4</Score>"],
    2: [write_answer("25", "done"), write_answer("41", "rest changed"), "<Thought>done</Thought>"],
}


@pytest.fixture(scope="module")
def writer():
    """A judge that writes one of `ANSWERS` whatever it is shown, taught here."""
    model = truth.qwen2("qwen2_vl", 1.0)
    rows = []
    for turns, texts in ANSWERS.items():
        for text in texts:
            asked = [truth.TEXTS[i] for i in range(turns)]
            ids, (answer,) = encode(
                TOKENIZER, THINKING, asked, [16] * (turns + 1), image_token="<|image_pad|>",
                answers=[text + TOKENIZER.eos_token],
            )  # fmt: skip
            rows.append((ids, answer))
    ids = pad_sequence([torch.tensor(question + answer) for question, answer in rows], batch_first=True)
    labels = pad_sequence([torch.tensor([-100] * len(q) + a) for q, a in rows], batch_first=True, padding_value=-100)
    types = (ids == IMAGE).int()
    count = int(types.sum()) // 16
    patches, grid = prepare_images(torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)), IMAGES)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        out = model(input_ids=ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=types, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_thinking_judge_reads_what_it_wrote(writer, turns, share_prefix):
    references, edits, _, owner = truth.group_inputs(2, 2, turns)
    instructions = [[truth.TEXTS[k] for k in range(turns)]] * len(edits)
    judge = HuggingFaceJudge(
        writer, TOKENIZER, IMAGES, THINKING, samples=24, max_new_tokens=20, share_prefix=share_prefix, seed=3
    )
    result = judge.score(references, edits, instructions, owner=owner)
    names = ["Score"] if turns == 1 else ["Turn1Score", "Turn2Score"]
    unread = 0
    assert result.variance.nan_to_num().max() > 0
    for row, answers in enumerate(result.answers):
        assert len(answers) == 24
        read = []
        for answer in answers:
            found = [answer.replace(" ", "").rpartition(f"<{name}>")[2].partition(f"</{name}>") for name in names]
            scores = zip(names, found, strict=True)
            if all(f"<{name}>" in answer and end and value in set("12345") for name, (value, end, _) in scores):
                read.append([float(value) for value, _, _ in found])
        unread += 24 - len(read)
        if not read:
            assert all(torch.isnan(field[row]).all() for field in result[:5])
            continue
        values = torch.tensor(read)
        torch.testing.assert_close(result.score[row], values.mean(0))
        torch.testing.assert_close(result.variance[row], values.var(0, unbiased=False))
        for k in range(turns):
            assert result.median[row, k] == sorted(values[:, k].tolist())[(len(read) - 1) // 2]
            shares = [(values[:, k] == v).double().mean().item() for v in set(values[:, k].tolist())]
            assert result.entropy[row, k].item() == pytest.approx(-sum(s * math.log(s) for s in shares), abs=1e-5)
        assert result.mass[row].tolist() == pytest.approx([len(read) / 24] * turns)
    assert result.failures == {"parse": unread}
    assert unread > 0
    assert judge.counts["prefixes"] == (2 if share_prefix else 0)
    again = judge.score(references, edits, instructions, owner=owner)
    assert again.answers == result.answers
    torch.testing.assert_close(again.score, result.score, rtol=0, atol=0, equal_nan=True)


def test_prefixes_do_not_change_what_a_thinking_judge_writes(writer):
    references, edits, instructions, owner = truth.group_inputs(2, 3, 2)
    written = [
        HuggingFaceJudge(
            writer, TOKENIZER, IMAGES, THINKING, temperature=0, max_new_tokens=16, share_prefix=share, max_tokens=budget
        ).score(references, edits, instructions, owner=owner)
        for share, budget in ((True, 4096), (False, 4096), (True, 150))
    ]
    assert written[0].answers == written[1].answers == written[2].answers


def test_unreadable_answers_are_counted_and_never_zero(writer):
    references, edits, instructions, _ = truth.group_inputs(2, 1, 1)
    judge = HuggingFaceJudge(writer, TOKENIZER, IMAGES, THINKING, samples=3, max_new_tokens=1)
    result = judge.score(references, edits, instructions)
    assert result.failures == {"parse": 6}
    assert all(torch.isnan(field).all() for field in result[:5])
    strict = HuggingFaceJudge(
        writer, TOKENIZER, IMAGES, THINKING, samples=24, max_new_tokens=20, min_mass=0.999, seed=3
    )
    result = strict.score(references, edits, [[truth.TEXTS[0]]] * 2)
    read = [[parse_answer(answer, 1, THINKING.answers) is not None for answer in own] for own in result.answers]
    assert result.failures["mass"] == sum(any(row) and not all(row) for row in read) > 0
    assert result.score.isnan().flatten().tolist() == [not all(row) for row in read]
