"""Servers for the served judge, a batch to score, and the truth by the fused head's reference."""

import zlib

import torch
from chat_server_fixture import JudgeServer, images_of

from mtedit_fast.judge.prompts import JudgePrompt
from mtedit_fast.judge.sequence import score_token_ids
from mtedit_fast.judge.served import ServedJudge
from mtedit_fast.ops import digit_score
from mtedit_fast.training.playground.judge_model import new_judge_tokenizer

TOKENIZER = new_judge_tokenizer()
THINKING = JudgePrompt("1-5", thinking=True)
TEXTS = ("Remove the red circle", "Add a blue square", "Make it dusk")
FIELDS = ("score", "variance", "entropy", "median", "mass")


def formula(text, images):
    """Log-probs that depend on every letter and pixel."""
    seed = zlib.crc32(text.encode() + b"".join(image.contiguous().numpy().tobytes() for image in images))
    return (3 * torch.randn(len(TOKENIZER), generator=torch.Generator().manual_seed(seed)).double()).log_softmax(0)


def serving():
    """For a fixture: starts servers of log-probs, closed at its end."""
    servers = []

    def start(*args, **options):
        servers.append(JudgeServer(TOKENIZER, *args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(server, prompt=JudgePrompt(), **options):
    return ServedJudge(server.url, "judge", prompt, **{"backoff": 0.001, "timeout": 5.0, **options})


def batch(rows=4, turns=3, originals=2, size=(8, 12)):
    """(references, edits, instructions, owner) with neighbours in different groups."""
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(256, (originals, 3, *size), generator=generator, dtype=torch.uint8)
    edits = torch.randint(256, (rows, turns, 3, *size), generator=generator, dtype=torch.uint8)
    owner = [row % originals for row in range(rows)]
    return references, edits, [list(TEXTS[:turns]) for _ in owner], owner


def ask(asked, data):
    references, edits, instructions, owner = data
    return asked.score(references, edits, instructions, owner=owner)


def truth(log_probs, prompt, data, **options):
    """{field: [B, K] fp64} of log_probs(text, images), by the fused head's own reference over the whole vocabulary."""
    references, edits, instructions, owner = data
    rows = []
    for images, first, texts in zip(edits, owner, instructions, strict=True):
        text = TOKENIZER.apply_chat_template(prompt.messages(texts), tokenize=False, add_generation_prompt=True)
        rows += [log_probs(text + opening, [references[first], *images]) for opening in prompt.openings(len(texts))]
    logits = torch.stack(rows)
    ids = score_token_ids(TOKENIZER, prompt.answers, "<Score>")
    found = digit_score(logits, torch.eye(logits.shape[1]).double(), ids, prompt.answers.values, **options)._asdict()
    found["mass"] = logits[:, ids].exp().sum(1)
    return {name: found[name].view(edits.shape[:2]) for name in FIELDS}


def assert_equal(scores, expected, where=...):
    for name in FIELDS:
        torch.testing.assert_close(getattr(scores, name)[where], expected[name].float()[where], rtol=1e-6, atol=1e-6)


def slot_of(body):
    """(row, turn) of a request, by its images among those of `batch()`; None for the health check's."""
    images = images_of(body)
    if not images:
        return None
    edits = batch()[1]
    (row,) = [row for row in range(len(edits)) if torch.equal(edits[row, 0], images[1])]
    return row, int(body["messages"][-1]["content"].removeprefix("<Turn")[0]) - 1
