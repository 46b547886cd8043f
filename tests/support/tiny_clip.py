# SPDX-License-Identifier: Apache-2.0
"""Tiny but real CLIP models with tokenizers, saved to folders as `from_pretrained` reads them."""

import math
from collections import OrderedDict
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from tests.support.tiny import WORDS


# As in CLIP's own vocabulary, the end of the text is the last token.
VOCABULARY = {word: i for i, word in enumerate(["!", "<unk>", *WORDS, "<s>", "</s>"])}


def save_tokenizer(folder: Path) -> Path:
    """Saves a tokenizer of whole words, with start, end and padding."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, VOCABULARY[token]) for token in ("<s>", "</s>")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="!",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=12,
    ).save_pretrained(folder)
    return folder


def save_clip(folder: Path, seed: int = 0, hidden_act: str = "gelu") -> Path:
    """Saves a `CLIPModel` for 32 x 32 images with its tokenizer, every weight drawn large enough to matter."""
    config = CLIPConfig(
        projection_dim=12,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 12,
            "hidden_act": hidden_act,
        },
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "projection_dim": 12,
            "hidden_act": hidden_act,
            "eos_token_id": VOCABULARY["</s>"],
            "bos_token_id": VOCABULARY["<s>"],
            "pad_token_id": 0,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif name != "logit_scale":
                nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.2)
        nn.init.constant_(model.logit_scale, math.log(100))  # as published; bfloat16 cannot hold it
    model.save_pretrained(folder)
    return save_tokenizer(folder)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 2 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Visual(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, patch: int, grid: int, embedding: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _Transformer(width, heads, depth)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embedding))

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """
    A CLIP written plainly from the description of the architecture, with the parameter names of the OpenCLIP library
    and the head widths of its ViT-H-14 (80 and 64). Two layers of three and two heads, for 28 x 28 images.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.visual = _Visual(width=240, heads=3, depth=2, patch=7, grid=4, embedding=16)
            self.transformer = _Transformer(width=128, heads=2, depth=3)
            self.token_embedding = nn.Embedding(len(VOCABULARY), 128)
            self.positional_embedding = nn.Parameter(torch.randn(12, 128))
            self.ln_final = nn.LayerNorm(128)
            self.text_projection = nn.Parameter(torch.randn(128, 16))
            self.logit_scale = nn.Parameter(torch.tensor(4.6))
            for parameter in self.parameters():
                if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                    parameter.data += 0.2 * torch.randn(parameter.shape)
        # Some versions of the library save the mask too.
        self.register_buffer("attn_mask", torch.full((12, 12), float("-inf")).triu(1))

    def encode_text(self, tokens):
        """`tokens` are padded with zeros to the full length; the end of the text has the highest number."""
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(-1)] @ self.text_projection
