"""Grounding DINOs of the real classes with random weights, a few thousand of them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

WORDS = ("red", "blue", "metal", "circle", "square", "sign", "a", "##s")


def tiny_tokenizer(words: Sequence[str] = WORDS) -> BertTokenizerFast:
    # the model knows the marks that close a phrase by BERT's ids: [CLS] 101, [SEP] 102, "." 1012, "?" 1029
    vocabulary = [f"[unused{i}]" for i in range(1030)]
    for token, i in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}.items():
        vocabulary[i] = token
    vocabulary += words
    return BertTokenizerFast(vocab={token: i for i, token in enumerate(vocabulary)})


def tiny_detector(kind: str) -> Any:
    torch.manual_seed(0)
    config, model = {
        "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
        "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
    }[kind]
    made = model(
        config(
            backbone_config=SwinConfig(
                image_size=32,
                embed_dim=8,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 2, 2],
                window_size=4,
                out_indices=[2, 3, 4],
            ),
            text_config=BertConfig(
                vocab_size=1040, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            ),
            num_queries=9,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_text_len=24,
        )
    ).eval()
    for parameter in made.parameters():  # scores that spread over (0, 1)
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return made
