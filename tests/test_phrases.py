"""Nouns and modifiers, and the tokens that stand for them in every family's text."""

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from tiny import tiny_editor
from tiny_families import tiny_klein, tiny_klein_kv, tiny_qwen
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mtedit_fast.editors import KleinEditor, KleinKVEditor, QwenEditor
from mtedit_fast.editors.qwen_text import encode_prompts
from mtedit_fast.inference_time import phrases
from mtedit_fast.inference_time.phrases import Phrase, editor_tokens, find_phrases, locate, prompt_tokens


def words_of(prompt, located):
    return prompt[slice(*located.noun)], [prompt[slice(*span)] for span in located.modifiers]


def token_words(prompt, tokens):
    return [prompt[slice(*token.span)].strip() for token in tokens]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("circle", Phrase("circle")),
        ("circle:red", Phrase("circle", ("red",))),
        (" fire truck : bright red, old ", Phrase("fire truck", ("bright red", "old"))),
    ],
)
def test_parsing(text, expected):
    assert Phrase.parse(text) == expected


@pytest.mark.parametrize("text", ["", ":red", "circle:", "circle:red,,blue"])
def test_parsing_refuses_missing_words(text):
    with pytest.raises(ValueError, match=r'phrase: expected "NOUN:MODIFIER,MODIFIER" or "NOUN", got'):
        Phrase.parse(text)


def test_of_equal_nouns_the_one_beside_its_modifiers_is_meant():
    prompt = "Add wood red circle left of wood blue circle"
    found = locate(prompt, [Phrase("circle", ("wood", "blue")), Phrase("circle", ("wood", "red"))])
    assert [place.noun[0] for place in found] == [prompt.rindex("circle"), prompt.index("circle")]
    assert [place.modifiers[0][0] for place in found] == [prompt.rindex("wood"), prompt.index("wood")]
    assert words_of(prompt, found[0]) == ("circle", ["wood", "blue"])


def test_words_are_whole_and_case_and_spacing_do_not_count():
    prompt = "A Redhead beside a RED  Fire\nTruck."
    (found,) = locate(prompt, [Phrase("fire truck", ("red",))])
    assert words_of(prompt, found) == ("Fire\nTruck", ["RED"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], r"phrases: expected at least one noun of 'Remove red circle', got none"),
        ([Phrase("square")], r"'square' is not in 'Remove red circle'; use its own words"),
        ([Phrase("circ")], r"'circ' is not in 'Remove red circle'"),
        ([Phrase("circle", ("blue",))], r"'blue' of 'circle' is not in 'Remove red circle'"),
        ([Phrase("circle"), Phrase("circle")], r"'circle' is not in 'Remove red circle' as often as phrases name it"),
        ([Phrase("circle", ("circle",))], r"'circle' of 'circle' is not in"),
    ],
)
def test_words_that_are_not_there(asked, message):
    with pytest.raises(ValueError, match=message):
        locate("Remove red circle", asked)


def clip_like():
    """Words to pieces, between a start and an end token, as CLIP's; lower case."""
    vocabulary = ["<s>", "</s>", "<unk>", "a", "red", "tur", "##quoise", "car", ",", "and"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", unk_token="<unk>")


def test_offsets_of_a_fast_tokenizer():
    prompt = "a turquoise car, and a red one"
    tokens = prompt_tokens(clip_like(), prompt, max_length=16)
    assert [token.place for token in tokens] == list(range(1, 10))  # after the start token
    assert token_words(prompt, tokens) == ["a", "tur", "quoise", "car", ",", "and", "a", "red", "one"]


def test_a_slow_tokenizer_is_counted():
    prompt = "Remove the rot-weiß circle."
    tokens = prompt_tokens(ByT5Tokenizer(), prompt, template="Do: {} !", max_length=64)
    letters = [(place, char) for place, char in enumerate(prompt.encode()) if char != ord(" ")]
    assert [token.place for token in tokens] == [4 + place for place, _ in letters]  # a token is a byte
    expected = [word for word in ("Remove", "the", "rot", "-", "weiß", "circle", ".") for _ in word.encode()]
    assert token_words(prompt, tokens) == expected


def test_a_slow_tokenizer_agrees_with_a_fast_one():
    class Slow(ByT5Tokenizer):
        """The fast tokenizer's tokens without its offsets."""

        fast = clip_like()

        def tokenize(self, text, **_):
            return self.fast.tokenize(text)

        def convert_tokens_to_ids(self, tokens):
            return self.fast.convert_tokens_to_ids(tokens)

        def __call__(self, text, **options):
            return self.fast(text, **options)

    prompt = "a turquoise car, and a red one"
    slow, fast = (prompt_tokens(tokenizer, prompt, max_length=16) for tokenizer in (Slow(), clip_like()))
    assert [token.place for token in slow] == [token.place for token in fast]
    for own, exact in zip(slow, fast, strict=True):  # to the word
        assert own.span[0] <= exact.span[0]
        assert own.span[1] >= exact.span[1]
        assert len(prompt[slice(*own.span)].split()) == 1


@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize("tokenizer", [clip_like(), ByT5Tokenizer()])
def test_a_prompt_that_is_cut_off(tokenizer, length):
    with pytest.raises(ValueError, match=rf"prompts: expected at most {length} tokens, .* is cut off after"):
        prompt_tokens(tokenizer, "a turquoise car, and a red one", max_length=length)


PROMPTS = ["remove the red circle", "add a blue square to the circle now please"]


def test_kontext_words_are_where_t5_has_them():
    editor = tiny_editor()
    prompts = ["Remove wood red circle", "Add blue sign A above metal green square"]
    for prompt, tokens in zip(prompts, editor_tokens(editor, prompts), strict=True):
        ids = editor.pipeline.tokenizer_2(prompt)["input_ids"]
        assert [editor.pipeline.tokenizer_2.decode(ids[token.place]) for token in tokens] == prompt.split()
        assert token_words(prompt, tokens) == prompt.split()


@pytest.mark.parametrize("kind", [KleinEditor, KleinKVEditor])
def test_klein_words_are_where_the_chat_template_puts_them(kind):
    editor = kind(tiny_klein() if kind is KleinEditor else tiny_klein_kv(), max_sequence_length=32)
    tokenizer = editor.pipeline.tokenizer
    for prompt, tokens in zip(PROMPTS, editor_tokens(editor, PROMPTS), strict=True):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
        ids = tokenizer(text, padding="max_length", max_length=32)["input_ids"]
        assert [tokenizer.decode(ids[token.place]) for token in tokens] == prompt.split()
        assert tokens[0].place > 0
    with pytest.raises(ValueError, match="is cut off after"):
        editor_tokens(kind(editor.pipeline, max_sequence_length=6), PROMPTS)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_qwen_words_follow_the_images_without_the_template_in_front(count):
    """Rows of the encoder's own embeddings, found by changing one word: causal, so those before it stay."""
    editor = QwenEditor(tiny_qwen(QwenImageEditPlusPipeline), max_sequence_length=96, condition_area=64**2)
    images = torch.rand(1, count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) if count else None
    (tokens,) = editor_tokens(editor, PROMPTS[:1], images)
    row = 0 if count else None
    options = (images, 64**2)
    changed = PROMPTS[0].replace("red", "blue")
    first, second = (encode_prompts(editor.pipeline, [(prompt, row)], *options) for prompt in (PROMPTS[0], changed))
    differ = (first.embeds - second.embeds)[0].abs().amax(-1) > 1e-6
    place = tokens[PROMPTS[0].split().index("red")].place
    assert differ.nonzero()[0].item() == place
    assert first.lengths[0] > tokens[-1].place > place


def test_qwens_first_version_and_one_image_per_prompt():
    editor = QwenEditor(tiny_qwen(), max_sequence_length=96, condition_area=64**2)
    images = torch.rand(2, 3, 64, 64)
    seen, blind = editor_tokens(editor, PROMPTS, images), editor_tokens(editor, PROMPTS)
    extra = editor.text_image_tokens(64, 64) + 2  # between its start and its end
    for with_image, without in zip(seen, blind, strict=True):
        assert [token.place - extra for token in with_image] == [token.place for token in without]


def test_an_unknown_editor():
    with pytest.raises(TypeError, match=r"editor: expected one of Kontext, Klein or Qwen, got object"):
        editor_tokens(object(), PROMPTS)


def test_without_a_parser_the_error_says_what_to_give():
    with pytest.raises(ImportError, match=r"phrases: expected those of every prompt, or spaCy and its model no_such_"):
        find_phrases(PROMPTS, model="no_such_model")


def parsed(words, heads, relations, parts):
    spacy = pytest.importorskip("spacy")
    return spacy.tokens.Doc(spacy.Vocab(), words=words.split(), heads=heads, deps=relations.split(), pos=parts.split())


def test_phrases_of_a_parse():
    document = parsed(
        "Add a large shiny red fire truck and remove the dog that is brown",
        [0, 6, 6, 6, 6, 6, 0, 0, 0, 10, 8, 12, 10, 12],
        "ROOT det amod amod amod compound dobj cc conj det dobj nsubj relcl acomp",
        "VERB DET ADJ ADJ ADJ NOUN NOUN CCONJ VERB DET NOUN PRON AUX ADJ",
    )
    expected = [Phrase("truck", ("large", "shiny", "red", "fire")), Phrase("dog", ("brown",))]
    assert phrases._of_parse(document) == expected


def test_predicates_and_coordinated_modifiers():
    document = parsed(
        "The car is red and old",
        [1, 2, 2, 2, 3, 3],
        "det nsubj ROOT acomp cc conj",
        "DET NOUN AUX ADJ CCONJ ADJ",
    )
    assert phrases._of_parse(document) == [Phrase("car", ("red", "old"))]


def test_an_instruction_without_nouns(monkeypatch):
    document = parsed("Make it brighter", [0, 2, 0], "ROOT nsubj ccomp", "VERB PRON ADJ")
    monkeypatch.setattr(phrases, "_parser", lambda model: lambda prompt: document)
    with pytest.raises(ValueError, match=r"prompts: expected a noun in every prompt, m finds none in 'Make it bright"):
        find_phrases(["Make it brighter"], "m")
