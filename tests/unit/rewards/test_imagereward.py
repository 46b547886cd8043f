# SPDX-License-Identifier: Apache-2.0
"""ImageReward: published names of weights, the network against one written out in torch, pairs, and the score."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trl_diffusion_opd.rewards import load_reward
from trl_diffusion_opd.rewards.imagereward import MAX_TOKENS, MEAN, STD, ImageRewardModel, rename_weights
from trl_diffusion_opd.rewards.preprocessing import clip_pixels


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a the red blue cat dog car on under and big small".split()]
VISION, TEXT, PATCH, IMAGE, LAYERS, HEADS = 128, 192, 4, 12, 2, {128: 2, 192: 3}


def checkpoint(seed=0):
    """Random weights under the names of the published file, with all that it holds beside the network."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def linear(name, inputs, outputs):
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weights[f"{name}.bias"] = torch.randn(outputs, generator=generator) / 4

    def norm(name, width):
        weights[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) / 4
        weights[f"{name}.bias"] = torch.randn(width, generator=generator) / 4

    visual = "blip.visual_encoder"
    weights[f"{visual}.cls_token"] = torch.randn(1, 1, VISION, generator=generator)
    weights[f"{visual}.pos_embed"] = torch.randn(1, (IMAGE // PATCH) ** 2 + 1, VISION, generator=generator)
    linear(f"{visual}.patch_embed.proj", 3 * PATCH**2, VISION)
    weights[f"{visual}.patch_embed.proj.weight"] = weights[f"{visual}.patch_embed.proj.weight"].view(
        VISION, 3, PATCH, PATCH
    )
    for layer in range(LAYERS):
        block = f"{visual}.blocks.{layer}"
        norm(f"{block}.norm1", VISION)
        linear(f"{block}.attn.qkv", VISION, 3 * VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.mlp.fc1", VISION, 2 * VISION)
        linear(f"{block}.mlp.fc2", 2 * VISION, VISION)
    norm(f"{visual}.norm", VISION)

    text = "blip.text_encoder"
    weights[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    weights[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS), TEXT, generator=generator)
    weights[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(40, TEXT, generator=generator)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in range(LAYERS):
        block = f"{text}.encoder.layer.{layer}"
        for attention, source in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{block}.{attention}.self.query", TEXT, TEXT)
            linear(f"{block}.{attention}.self.key", source, TEXT)
            linear(f"{block}.{attention}.self.value", source, TEXT)
            linear(f"{block}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{block}.{attention}.output.LayerNorm", TEXT)
        linear(f"{block}.intermediate.dense", TEXT, 3 * TEXT)
        linear(f"{block}.output.dense", 3 * TEXT, TEXT)
        norm(f"{block}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", VISION, 16)
    linear("blip.text_proj", TEXT, 16)
    for index, (inputs, outputs) in zip(
        (0, 2, 4, 6, 7), ((TEXT, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True
    ):
        linear(f"mlp.layers.{index}", inputs, outputs)
    return weights


def written_out(weights, pixels, input_ids, attention_mask):
    """BLIP's ViT, BERT with cross-attention and the head of ImageReward, from their papers, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items() if tensor.is_floating_point()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x, eps):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def attend(query, key, value, mask):
        heads = HEADS[query.shape[-1]]
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    visual = "blip.visual_encoder"
    patches = F.unfold(pixels.double(), PATCH, stride=PATCH).transpose(1, 2)
    x = patches @ w[f"{visual}.patch_embed.proj.weight"].flatten(1).T + w[f"{visual}.patch_embed.proj.bias"]
    x = torch.cat([w[f"{visual}.cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{visual}.pos_embed"]
    for layer in range(LAYERS):
        block = f"{visual}.blocks.{layer}"
        query, key, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(query, key, value, None))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{visual}.norm", x, 1e-6)

    text = "blip.text_encoder"
    x = w[f"{text}.embeddings.word_embeddings.weight"][input_ids]
    x = x + w[f"{text}.embeddings.position_embeddings.weight"][: input_ids.shape[1]]
    x = norm(f"{text}.embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        block = f"{text}.encoder.layer.{layer}"
        for name, source, mask in (("attention", None, attention_mask), ("crossattention", seen, None)):
            query = linear(f"{block}.{name}.self.query", x)
            key, value = (
                linear(f"{block}.{name}.self.{n}", x if source is None else source) for n in ("key", "value")
            )
            out = linear(f"{block}.{name}.output.dense", attend(query, key, value, mask))
            x = norm(f"{block}.{name}.output.LayerNorm", x + out, 1e-12)
        out = linear(f"{block}.output.dense", gelu(linear(f"{block}.intermediate.dense", x)))
        x = norm(f"{block}.output.LayerNorm", x + out, 1e-12)
    x = x[:, 0]
    for index in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{index}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def weights():
    return checkpoint()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, IMAGE, IMAGE, generator=generator)
    input_ids = torch.randint(4, len(WORDS), (3, 9), generator=generator)
    attention_mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    return pixels, input_ids * attention_mask, attention_mask


def test_forward_is_that_of_the_written_out_network(weights, inputs):
    model = ImageRewardModel.from_weights(weights).eval().double()
    with torch.no_grad():
        scores = model(inputs[0].double(), *inputs[1:])
    expected = written_out(weights, *inputs)
    # The head ends in float32.
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-6)
    assert scores.std() > 0.1
    with torch.no_grad():
        images = model.vision(inputs[0].double()).last_hidden_state
        hidden = model.text(*inputs[1:], encoder_hidden_states=images, is_decoder=False).last_hidden_state
        # Before the head: the difference of an epsilon of 1e-5, or of 2 heads for 3, would show here.
        score = (model.mlp(hidden[:, 0]) - MEAN) / STD
    torch.testing.assert_close(score, expected, rtol=1e-11, atol=1e-11)


def test_sizes_are_read_from_the_weights(weights):
    model = ImageRewardModel.from_weights(weights)
    vision, text = model.vision.config, model.text.config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (VISION, LAYERS, 2)
    assert (vision.patch_size, vision.image_size, vision.intermediate_size) == (PATCH, IMAGE, 2 * VISION)
    assert (text.hidden_size, text.num_attention_heads, text.encoder_hidden_size) == (TEXT, 3, VISION)
    assert (text.vocab_size, text.max_position_embeddings, text.intermediate_size) == (len(WORDS), 40, 3 * TEXT)


def test_all_weights_are_renamed_and_nothing_is_left_over(weights):
    renamed = rename_weights(weights)
    assert renamed.keys() == ImageRewardModel.from_weights(weights).state_dict().keys()
    assert len(weights) - len(renamed) == 5  # two projections, and the positions
    assert (
        renamed["vision.encoder.layers.1.self_attn.projection.bias"]
        is (weights["blip.visual_encoder.blocks.1.attn.proj.bias"])
    )
    assert renamed["vision.post_layernorm.weight"] is weights["blip.visual_encoder.norm.weight"]


@pytest.mark.parametrize("change", ["missing", "left over", "other"])
def test_weights_that_do_not_fit_are_told(weights, change):
    weights = dict(weights)
    if change == "missing":
        del weights["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    elif change == "left over":
        weights["blip.text_decoder.bias"] = torch.zeros(1)
    else:
        weights = {"layers.0.weight": torch.zeros(1)}
    message = {
        "missing": r"1 are missing \(\['text.encoder.layer.1.crossattention.self.key.bias'\]\) and 0 are left over",
        "left over": r"0 are missing .* and 1 are left over",
        "other": "not the weights of ImageReward",
    }
    with pytest.raises(ValueError, match=message[change]):
        ImageRewardModel.from_weights(weights)


@torch.no_grad()
def test_padding_does_not_count_and_every_word_does(weights, inputs):
    pixels, input_ids, attention_mask = inputs
    model = ImageRewardModel.from_weights(weights).eval()
    scores = model(pixels, input_ids, attention_mask)
    other_padding = torch.where(attention_mask == 1, input_ids, 7)
    torch.testing.assert_close(model(pixels, other_padding, attention_mask), scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model(pixels, input_ids[:, :5], attention_mask[:, :5])[1:], scores[1:], atol=1e-5, rtol=0
    )
    # The last word reaches the first token: the text is not causal.
    other_word = input_ids.clone()
    other_word[0, 8] = 4 if input_ids[0, 8] != 4 else 5
    assert abs(model(pixels, other_word, attention_mask) - scores)[0] > 1e-3
    assert (abs(model(pixels.flip(0), input_ids, attention_mask) - scores)[[0, 2]] > 1e-3).all()


@pytest.mark.parametrize("bias, score", [(MEAN, 0.0), (MEAN + STD, 1.0), (0.0, -0.16178), (3.0, 2.74143)])
def test_score_is_the_standardised_output_of_the_head(weights, inputs, bias, score):
    weights = dict(weights)
    weights["mlp.layers.7.weight"] = torch.zeros(1, 16)
    weights["mlp.layers.7.bias"] = torch.tensor([bias])
    with torch.no_grad():
        scores = ImageRewardModel.from_weights(weights)(*inputs)
    assert scores.tolist() == pytest.approx([score] * 3, abs=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, folder / "ImageReward.pt")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder / "bert")
    return folder


def test_reward_scores_pairs(folder, weights):
    reward = load_reward(
        "imagereward",
        model_name_or_path=folder,
        tokenizer_name_or_path=folder / "bert",
        device="cpu",
        batch_size=2,
    )
    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(2))
    prompts = ["a red cat on the big blue car", "Dog", "the car " * 40]
    scores = reward(images, prompts)

    ids = torch.zeros(3, MAX_TOKENS, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        tokens = [2, *(WORDS.index(word) for word in prompt.lower().split())][: MAX_TOKENS - 1] + [3]
        row[: len(tokens)] = torch.tensor(tokens)
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    expected = written_out(weights, clip_pixels(pictures, IMAGE, center=round), ids, (ids > 0).long())
    assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(scores) - min(scores) > 0.1
    assert [reward(images[i : i + 1], prompts[i : i + 1])[0] for i in range(3)] == pytest.approx(scores, abs=1e-5)
    assert load_reward(
        "imagereward",
        model_name_or_path=folder / "ImageReward.pt",
        tokenizer_name_or_path=folder / "bert",
        device="cpu",
    )(images, prompts) == pytest.approx(scores, abs=1e-5)


def test_dtype(folder):
    options = {"model_name_or_path": folder, "tokenizer_name_or_path": folder / "bert", "device": "cpu"}
    images, prompts = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(2)), ["a cat", "Dog", "the car"]
    full = load_reward("imagereward", **options)(images, prompts)
    half = load_reward("imagereward", **options, dtype="bfloat16")
    scores = half(images, prompts)
    assert {p.dtype for p in half.models["model"].parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in half.models["model"].parameters())
    assert scores != full and scores == pytest.approx(full, abs=0.1)
    assert half.to(dtype="float32")(images, prompts) == full


class Planted:
    def __reduce__(self):
        return (open, ("planted", "w"))


def test_code_in_the_weights_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"blip.x": Planted()}, tmp_path / "ImageReward.pt")
    reward = load_reward("imagereward", model_name_or_path=tmp_path, tokenizer_name_or_path=folder / "bert")
    with pytest.raises(ValueError, match="more than tensors"):
        reward.load()
    assert not (tmp_path / "planted").exists()
