"""What judges are asked, as text and as tokens, and how their answers are read."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtedit_fast.judge import SCALES, JudgePrompt, Scale, parse_answer, write_answer
from mtedit_fast.judge.prompts import THINKING
from mtedit_fast.judge.sequence import encode, score_token_ids, split_question
from mtedit_fast.training.playground.judge_model import CHAT_TEMPLATE, SPECIAL, new_judge_tokenizer

TOKENIZER = new_judge_tokenizer()
IMAGE = "<|image_pad|>"


def byte_level(merges=()):
    """A tokenizer of bytes, with some pairs merged."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=list(SPECIAL), chat_template=CHAT_TEMPLATE
    )


def texts_and_images(messages):
    return [part.get("text", "IMAGE") for message in messages for part in message["content"]]


@pytest.mark.parametrize("scale", SCALES)
def test_one_edit(scale):
    prompt = JudgePrompt(scale)
    system, before, image, between, edited = texts_and_images(prompt.messages(["remove the dog"]))
    assert system == SCALES[scale].rubric
    assert all(text in system for text in SCALES[scale].texts)
    assert (image, edited) == ("IMAGE", "IMAGE")
    assert before.startswith("Original")
    assert "remove the dog" in between
    assert [message["role"] for message in prompt.messages(["x"])] == ["system", "user"]


def test_several_edits_follow_all_instructions():
    instructions = ["remove the dog", "add a cat", "make it night"]
    parts = texts_and_images(JudgePrompt().messages(instructions))
    edits = [i for i, part in enumerate(parts) if part == "IMAGE"]
    assert len(edits) == 4
    told = "".join(parts[: edits[1]])
    assert all(f"{turn}. {text}" in told for turn, text in enumerate(instructions, 1))
    for turn, place in enumerate(edits[1:], 1):
        assert parts[place - 1].endswith(f"After turn {turn}: ")
        assert not any(text in parts[place - 1] for text in instructions) or turn == 1


def test_thinking_and_rubric():
    system = JudgePrompt("0-5", thinking=True).messages(["x"])[0]["content"][0]["text"]
    assert system == f"{SCALES['0-5'].rubric}\n{THINKING}"
    own = JudgePrompt(rubric="Only colours count.").messages(["x"])[0]["content"][0]["text"]
    assert own == "Only colours count."


def test_scales_are_consistent():
    for scale in SCALES.values():
        assert len(set(scale.texts)) == len(scale.texts) == len(scale.values)
        assert all(
            float(text) == value for text, value in zip(scale.texts, scale.values, strict=True) if text.isdigit()
        )


@pytest.mark.parametrize(
    ("instructions", "message"),
    [([], "at least one text"), ("remove it", "at least one text"), ([" "], r"instructions\[0\]"),
     (["x", ""], r"instructions\[1\]"), (["x", None], r"instructions\[1\]")],
)  # fmt: skip
def test_bad_instructions(instructions, message):
    with pytest.raises(ValueError, match=message):
        JudgePrompt().messages(instructions)


def test_unknown_scale():
    with pytest.raises(ValueError, match="scale must be one of 1-5, 0-5, binary, yes_no, got '1-10'"):
        JudgePrompt("1-10")


@pytest.mark.parametrize("thought", [None, "the dog is gone"])
@pytest.mark.parametrize("texts", [["4"], ["1", "5", "2"]])
def test_written_answers_are_read_back(texts, thought):
    answer = write_answer(texts, thought)
    assert parse_answer(answer, len(texts), SCALES["1-5"]) == [float(text) for text in texts]
    for opening in JudgePrompt().openings(len(texts)):
        assert answer.count(opening) == 1
    assert ("<Thought>" in answer) == (thought is not None)


@pytest.mark.parametrize(
    ("answer", "turns", "scale", "expected"),
    [
        ("<Score>3.5</Score>", 1, "1-5", [3.5]),
        ("<Score> 4.0\n</Score>", 1, "1-5", [4.0]),
        ("not <Score>1</Score> but <Score>5</Score>", 1, "1-5", [5.0]),
        ("<Score>Yes</Score>", 1, "yes_no", [1.0]),
        ("<Score>no</Score>", 1, "yes_no", [0.0]),
        ("<Turn2Score>2</Turn2Score> <Turn1Score>1</Turn1Score>", 2, "1-5", [1.0, 2.0]),
        ("<Score>0.5</Score>", 1, "binary", [0.5]),
        ("", 1, "1-5", None),
        ("<Score>4", 1, "1-5", None),
        ("<Score></Score>", 1, "1-5", None),
        ("<Score>four</Score>", 1, "1-5", None),
        ("<Score>0</Score>", 1, "1-5", None),
        ("<Score>55</Score>", 1, "1-5", None),
        ("<Score>-1</Score>", 1, "0-5", None),
        ("<Score>nan</Score>", 1, "1-5", None),
        ("<Score>1e0</Score>", 1, "1-5", None),
        ("<Score>4/5</Score>", 1, "1-5", None),
        ("<Score>1</Score>", 1, "yes_no", None),
        ("<Score>3</Score>", 2, "1-5", None),
        ("<Turn1Score>3</Turn1Score>", 2, "1-5", None),
        ("<Score>5</Score> or rather <Score>?</Score>", 1, "1-5", None),
    ],
)
def test_reading(answer, turns, scale, expected):
    assert parse_answer(answer, turns, SCALES[scale]) == expected


@pytest.mark.parametrize("tokenizer", [TOKENIZER, byte_level(), byte_level([("<", "T"), ("n", "1"), ("2", "S")])])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_question_in_parts_is_the_question(tokenizer, turns):
    instructions = ["add a red circle", "remove it", "x"][:turns]
    counts = [3, 2, 4, 1][: turns + 1]
    prompt = JudgePrompt(rubric="Score each edit.")
    whole, openings = encode(tokenizer, prompt, instructions, counts, image_token=IMAGE)
    text = tokenizer.apply_chat_template(
        prompt.messages(instructions), tokenize=False, add_generation_prompt=True
    ).replace(IMAGE, "{}").format(*(IMAGE * count for count in counts))  # fmt: skip
    parts = split_question(tokenizer, prompt, instructions, counts, image_token=IMAGE)
    assert len(parts.branches) == turns
    for opening, ids, branch in zip(prompt.openings(turns), openings, parts.branches, strict=True):
        expected = tokenizer.encode(text + opening, add_special_tokens=False)
        assert whole + ids == expected
        assert parts.prefix + parts.tail + branch == expected
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    assert parts.prefix.count(image) == counts[0]
    assert parts.tail.count(image) == sum(counts[1:])
    assert parts.tail[0] == image
    starts = {tuple(branch[:1]) for branch in parts.branches}
    assert len(starts) > 1 or turns == 1  # nothing more could be shared


def test_the_prefix_is_the_same_whatever_the_edits_sizes():
    split = [
        split_question(TOKENIZER, JudgePrompt(), ["add it"], [4, count], image_token=IMAGE).prefix for count in (2, 9)
    ]
    assert split[0] == split[1]


def test_bad_questions():
    with pytest.raises(ValueError, match="expected 2, the original and one per instruction, got 3"):
        encode(TOKENIZER, JudgePrompt(), ["x"], [1, 1, 1], image_token=IMAGE)
    blind = new_judge_tokenizer()
    blind.chat_template = "{% for message in messages %}{{ message.role }}{% endfor %}"
    with pytest.raises(ValueError, match="must take images"):
        encode(blind, JudgePrompt(), ["x"], [1, 1], image_token=IMAGE)
    merged = byte_level([("\u010a", "<")])  # the question's last line break with the answer's first sign
    with pytest.raises(ValueError, match="changes the tokens of the question"):
        encode(merged, JudgePrompt(), ["x"], [1, 1], image_token=IMAGE)


@pytest.mark.parametrize("scale", SCALES)
def test_score_tokens(scale):
    ids = score_token_ids(TOKENIZER, SCALES[scale], "<Score>")
    assert TOKENIZER.convert_ids_to_tokens(list(ids)) == list(SCALES[scale].texts)


def test_a_tokenizer_that_splits_a_score():
    ten = Scale(("1", "10"), (1.0, 10.0), "")
    with pytest.raises(ValueError, match=r"'10' after '<Score>' is 2 tokens.*\['1', '0'\].*scale of single tokens"):
        score_token_ids(TOKENIZER, ten, "<Score>")
    with pytest.raises(ValueError, match="'no' after '<Score>' is 2 tokens"):
        score_token_ids(byte_level(), SCALES["yes_no"], "<Score>")
    with pytest.raises(ValueError, match="'1' after '<Score>' is 0 tokens"):  # merged into the tag
        score_token_ids(byte_level([(">", "1")]), SCALES["binary"], "<Score>")
    with pytest.raises(ValueError, match="share tokens"):
        score_token_ids(TOKENIZER, Scale(("absent", "missing-too"[:6]), (0.0, 1.0), ""), "<Score>")
