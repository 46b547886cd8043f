# SPDX-License-Identifier: Apache-2.0
"""A tiny HPSv3 with random weights under the published names, and what it computes, written from its definition."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = [
    "<unk>",
    "system",
    "user",
    "assistant",
    "How",
    "good",
    "is",
    "it",
    "Rate",
    "this",
    "END",
    "cat",
    "dog",
    "red",
    "a",
]
VOCABULARY = {word: index for index, word in enumerate(SPECIAL + WORDS)}
REWARD = len(VOCABULARY)  # the token that the authors add
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A stand-in for the authors' source, in its form. It must not be run.
SOURCE = (
    "import nothing_like_this\n"
    'INSTRUCTION = """\nHow good is it: {text_prompt}\n"""\n'
    'prompt_with_special_token = """\nRate this: <|Reward|>\n\nEND\n"""\n'
    'open("ran", "w")\n'
)
TEXT = "\nHow good is it: {text_prompt}\n\nRate this: <|Reward|>\n\nEND\n"
TEXT_SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()

WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 32, 4, 2, 48, 2
VISION_WIDTH, VISION_HEADS, VISION_MLP, DEPTH, PATCH = 16, 2, 32, 2, 14
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the names of the published file."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def add(name: str, *shape: int, around: float = 0.0, scale: float | None = None) -> None:
        scale = scale or (0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
        weights[name] = around + scale * torch.randn(shape, generator=generator)

    def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        add(f"{name}.weight", outputs, inputs)
        if bias:
            add(f"{name}.bias", outputs)

    def norm(name: str, width: int, bias: bool = True) -> None:
        add(f"{name}.weight", width, around=1.0)
        if bias:
            add(f"{name}.bias", width)

    add("visual.patch_embed.proj.weight", VISION_WIDTH, 3, 2, PATCH, PATCH)
    for block in (f"visual.blocks.{index}" for index in range(DEPTH)):
        norm(f"{block}.norm1", VISION_WIDTH)
        norm(f"{block}.norm2", VISION_WIDTH)
        linear(f"{block}.attn.qkv", 3 * VISION_WIDTH, VISION_WIDTH)
        linear(f"{block}.attn.proj", VISION_WIDTH, VISION_WIDTH)
        linear(f"{block}.mlp.fc1", VISION_MLP, VISION_WIDTH)
        linear(f"{block}.mlp.fc2", VISION_WIDTH, VISION_MLP)
    norm("visual.merger.ln_q", VISION_WIDTH)
    linear("visual.merger.mlp.0", 4 * VISION_WIDTH, 4 * VISION_WIDTH)
    linear("visual.merger.mlp.2", WIDTH, 4 * VISION_WIDTH)
    add("model.embed_tokens.weight", REWARD + 1, WIDTH, scale=1.0)
    for layer in (f"model.layers.{index}" for index in range(LAYERS)):
        norm(f"{layer}.input_layernorm", WIDTH, bias=False)
        norm(f"{layer}.post_attention_layernorm", WIDTH, bias=False)
        linear(f"{layer}.self_attn.q_proj", WIDTH, WIDTH)
        linear(f"{layer}.self_attn.k_proj", WIDTH * KV_HEADS // HEADS, WIDTH)
        linear(f"{layer}.self_attn.v_proj", WIDTH * KV_HEADS // HEADS, WIDTH)
        linear(f"{layer}.self_attn.o_proj", WIDTH, WIDTH, bias=False)
        linear(f"{layer}.mlp.gate_proj", MLP, WIDTH, bias=False)
        linear(f"{layer}.mlp.up_proj", MLP, WIDTH, bias=False)
        linear(f"{layer}.mlp.down_proj", WIDTH, MLP, bias=False)
    norm("model.norm", WIDTH, bias=False)
    linear("lm_head", REWARD + 1, WIDTH, bias=False)
    linear("rm_head.0", 1024, WIDTH)
    linear("rm_head.3", 16, 1024)
    linear("rm_head.5", 2, 16)
    return weights


def save_base(folder: Path) -> Path:
    """Config, tokenizer and image processor of a tiny Qwen2-VL, as files of the form that the Hub has."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*SPECIAL[1:2], *SPECIAL[3:]],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    config = {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": REWARD + 7,  # padded, as in the published config
        "bos_token_id": 0,
        "eos_token_id": 2,
        "image_token_id": VOCABULARY["<|image_pad|>"],
        "video_token_id": REWARD + 5,
        "vision_start_token_id": VOCABULARY["<|vision_start|>"],
        "vision_end_token_id": VOCABULARY["<|vision_end|>"],
        "vision_config": {
            "depth": DEPTH,
            "embed_dim": VISION_WIDTH,
            "hidden_size": WIDTH,
            "mlp_ratio": VISION_MLP // VISION_WIDTH,
            "num_heads": VISION_HEADS,
            "in_chans": 3,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
    processor |= {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor |= {"image_mean": MEAN.tolist(), "image_std": STD.tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_tiny(folder: Path) -> Path:
    """`base`, `HPSv3.safetensors` and `text.py`."""
    save_base(folder / "base")
    save_file(random_weights(), folder / "HPSv3.safetensors")
    (folder / "text.py").write_text(SOURCE)
    return folder


# What it computes


def reference(weights: dict[str, torch.Tensor], image: torch.Tensor, prompt: str, *, by_row: bool = False) -> float:
    """The score of an image `[3, H, W]` in `[0, 1]`; `by_row` numbers the tokens of the image as Qwen2-VL does elsewhere."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    rows, columns, features = _see(w, image)
    text = TEXT.replace("{text_prompt}", prompt)
    ids = [VOCABULARY[t] for t in ("<|im_start|>", "user", "<|vision_start|>")]
    first = len(ids)
    ids += [VOCABULARY["<|image_pad|>"]] * len(features) + [VOCABULARY["<|vision_end|>"]]
    ids += [_token(word) for word in text.replace(":", " : ").split()]
    ids += [VOCABULARY[t] for t in ("<|im_end|>", "<|im_start|>", "assistant")]
    states = w["model.embed_tokens.weight"][ids]
    states[first : first + len(features)] = features
    positions = torch.arange(len(ids)).double().expand(3, -1).clone()
    if by_row:
        grid = torch.stack([torch.zeros(rows * columns), *map(torch.flatten, _grid(rows, columns))])
        positions[:, first : first + len(features)] = first + grid
        positions[:, first + len(features) :] = (
            first + max(rows, columns) + torch.arange(len(ids) - first - len(features))
        )
    states = _read(w, states, positions)
    state = states[ids.index(REWARD)]
    hidden = F.relu(F.linear(state, w["rm_head.0.weight"], w["rm_head.0.bias"]))
    hidden = F.relu(F.linear(hidden, w["rm_head.3.weight"], w["rm_head.3.bias"]))
    return F.linear(hidden, w["rm_head.5.weight"], w["rm_head.5.bias"])[0].item()


def _token(word: str) -> int:
    return REWARD if word == "<|Reward|>" else VOCABULARY.get(word, VOCABULARY["<unk>"])


def size_of(height: int, width: int) -> tuple[int, int]:
    """Multiples of 28, with at most (shrunk) or at least (enlarged) 256 squares of 28 x 28."""
    h, w = round(height / 28) * 28, round(width / 28) * 28
    scale = math.sqrt(height * width / (256 * 28 * 28))
    if h * w > 256 * 28 * 28:
        return math.floor(height / scale / 28) * 28, math.floor(width / scale / 28) * 28
    if h * w < 256 * 28 * 28:
        scale = math.sqrt(256 * 28 * 28 / (height * width))
        return math.ceil(height * scale / 28) * 28, math.ceil(width * scale / 28) * 28
    return h, w


def _grid(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")


def _rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turns pairs `(i, i + D / 2)` of `[N, heads, D]` by angles `[N, D / 2]`."""
    one, two = states.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """`[N, heads, D]` each; returns `[N, heads * D]`."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def _see(w: dict[str, torch.Tensor], image: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """Rows, columns and features of the squares of 2 x 2 patches, row by row."""
    height, width = size_of(*image.shape[-2:])
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    array = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) / 255
    pixels = torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1)
    rows, columns = height // PATCH, width // PATCH
    patches = pixels.reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4)
    # An image is a film of two equal pictures.
    x = torch.einsum("rcdhw,edhw->rce", patches, w["visual.patch_embed.proj.weight"].sum(2)).flatten(0, 1)
    width_of_head = VISION_WIDTH // VISION_HEADS
    frequencies = 10000.0 ** -(torch.arange(0, width_of_head // 2, 2).double() / (width_of_head // 2))
    row, column = (place.flatten()[:, None] for place in _grid(rows, columns))
    angles = torch.cat([row * frequencies, column * frequencies], dim=1)
    for block in (f"visual.blocks.{index}" for index in range(DEPTH)):
        y = F.layer_norm(x, [VISION_WIDTH], w[f"{block}.norm1.weight"], w[f"{block}.norm1.bias"], 1e-6)
        y = F.linear(y, w[f"{block}.attn.qkv.weight"], w[f"{block}.attn.qkv.bias"])
        q, k, v = y.view(len(y), 3, VISION_HEADS, -1).unbind(1)
        y = _attend(_rotate(q, angles), _rotate(k, angles), v, causal=False)
        x = x + F.linear(y, w[f"{block}.attn.proj.weight"], w[f"{block}.attn.proj.bias"])
        y = F.layer_norm(x, [VISION_WIDTH], w[f"{block}.norm2.weight"], w[f"{block}.norm2.bias"], 1e-6)
        y = F.linear(y, w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc1.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), w[f"{block}.mlp.fc2.weight"], w[f"{block}.mlp.fc2.bias"])
    x = F.layer_norm(x, [VISION_WIDTH], w["visual.merger.ln_q.weight"], w["visual.merger.ln_q.bias"], 1e-6)
    squares = x.view(rows // 2, 2, columns // 2, 2, -1).permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)
    squares = F.gelu(F.linear(squares, w["visual.merger.mlp.0.weight"], w["visual.merger.mlp.0.bias"]))
    squares = F.linear(squares, w["visual.merger.mlp.2.weight"], w["visual.merger.mlp.2.bias"])
    return rows // 2, columns // 2, squares


def _read(w: dict[str, torch.Tensor], x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The states at the end of the language model, given positions `[3, N]` in time, row and column."""
    width_of_head = WIDTH // HEADS
    frequencies = 10000.0 ** -(torch.arange(0, width_of_head, 2).double() / width_of_head)
    axes = torch.tensor([0, 1, 2, 2])  # sections of 1, 1 and 2 frequencies
    angles = positions[axes].T * frequencies

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    for layer in (f"model.layers.{index}" for index in range(LAYERS)):
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            F.linear(y, w[f"{layer}.self_attn.{part}_proj.weight"], w[f"{layer}.self_attn.{part}_proj.bias"]).view(
                len(y), -1, width_of_head
            )
            for part in "qkv"
        )
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (_rotate(k, angles), v))
        x = x + F.linear(_attend(_rotate(q, angles), k, v, causal=True), w[f"{layer}.self_attn.o_proj.weight"])
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate = F.silu(F.linear(y, w[f"{layer}.mlp.gate_proj.weight"]))
        x = x + F.linear(gate * F.linear(y, w[f"{layer}.mlp.up_proj.weight"]), w[f"{layer}.mlp.down_proj.weight"])
    return norm(x, "model.norm")
