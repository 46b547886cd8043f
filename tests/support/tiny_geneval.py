# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the GenEval reward."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from trl_diffusion_opd.rewards.geneval_rules import CLASSES, COLORS


def save_tiny_models(folder):
    """A Mask2Former of 3 queries that sees dogs everywhere, and a CLIP, both with random weights."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    detector = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=swin,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=3,
            num_labels=80,
        )
    )
    with torch.no_grad():
        detector.class_predictor.weight.normal_(std=0.3)
        detector.class_predictor.bias.zero_()
        detector.class_predictor.bias[CLASSES.index("dog")] = 9.0
    detector.save_pretrained(folder / "detector")

    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**towers, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 1},
            vision_config={**towers, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.normal_(std=0.3)
    clip.save_pretrained(folder / "clip")
    words = ["<s>", "</s>", "<unk>", "<pad>", *COLORS, "a", "photo", "of", "-", "colored", "object", "dog", "cat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder / "clip")
