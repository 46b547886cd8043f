# SPDX-License-Identifier: Apache-2.0
"""The rewards on CLIP, on tiny models: preprocessing, values against other implementations, loading."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from tests.support.random_images import pictures
from tests.support.tiny_clip import OpenCLIP, save_clip, save_tokenizer
from trl_diffusion_opd.hub.errors import SourceError
from trl_diffusion_opd.rewards import load_reward
from trl_diffusion_opd.rewards.hpsv2 import config_of, from_open_clip
from trl_diffusion_opd.rewards.models import ScoreHead, from_weights
from trl_diffusion_opd.rewards.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    clip_pixels,
    clip_pixels_bilinear,
    hps_pixels,
    to_pil,
    to_uint8,
)


PROMPTS = ["a red circle", "two cats on the table", "a photo of a dog and a bird with text that says hello", "", "sun"]
# Square, wide and tall, larger and smaller than the models' 32 pixels, with odd margins.
SIZES = [(64, 64), (32, 32), (40, 67), (71, 33), (20, 51)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`clip` with its tokenizer, `hps.pt` and `hps.safetensors`, `aesthetic.pth`, all tiny."""
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    save_tokenizer(folder / "tokenizer")
    weights = OpenCLIP().state_dict()
    torch.save({"state_dict": weights}, folder / "HPS_v2.1_compressed.pt")
    save_file(weights, folder / "hps.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # As published: dropouts between the layers, which have names with gaps.
        layers = [nn.Linear(12, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)]
        head = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))
        nn.init.constant_(head[-1].bias, 5.0)
    torch.save(
        {f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, folder / "aesthetic-model.pth"
    )
    return folder


@pytest.fixture
def build(folder):
    """Builds one of the four rewards on the tiny models."""
    options = {
        "pickscore": {"model_name_or_path": folder / "clip", "tokenizer_name_or_path": folder / "tokenizer"},
        "clipscore": {"model_name_or_path": folder / "clip"},
        "hpsv2": {"model_name_or_path": folder, "tokenizer_name_or_path": folder / "tokenizer"},
        "aesthetic": {"model_name_or_path": folder / "clip", "predictor_name_or_path": folder},
    }
    return lambda name, **kwargs: load_reward(name, **{"device": "cpu", **options[name], **kwargs})


def resized(images: torch.Tensor, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    """PIL's resize of every channel as floats, in float64 afterwards."""
    return np.stack(
        [
            [np.asarray(Image.fromarray(channel.numpy()).resize((width, height), resample)) for channel in image]
            for image in images
        ]
    ).astype(np.float64)


def normalized(array: np.ndarray) -> np.ndarray:
    return (array - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[:, None, None]


def reference_features(folder, pixels, prompts=None):
    """`CLIPModel` in float64, texts padded to the full length; normalized."""
    model = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        image = model.get_image_features(torch.as_tensor(pixels, dtype=torch.float64)).pooler_output
        image = image / image.norm(dim=-1, keepdim=True)
        if prompts is None:
            return image
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "clip")
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        text = model.get_text_features(**tokens).pooler_output
    return image, text / text.norm(dim=-1, keepdim=True), model.logit_scale.exp().item()


class TestPreprocessing:
    @pytest.mark.parametrize("size", SIZES)
    def test_clip_equals_transformers(self, size):
        images = to_pil(pictures(2, *size))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        expected = processor(images, return_tensors="pt")["pixel_values"]
        assert torch.equal(clip_pixels(images, 32), expected)

    def test_clip_defaults_equal_those_of_transformers(self):
        images = to_pil(pictures(1, 240, 300))
        expected = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
        assert torch.equal(clip_pixels(images), expected)

    @pytest.mark.parametrize(("size", "corner"), [((32, 33), (0, 0)), ((35, 32), (2, 0)), ((32, 37), (0, 2))])
    def test_a_crop_that_cannot_be_in_the_middle(self, size, corner):
        """torchvision rounds half of a margin to the even number, transformers down: half of 3 is 2 or 1."""
        images = pictures(1, *size)
        (top, left), pixels = corner, to_uint8(images)[0].transpose(2, 0, 1) / 255
        expected = normalized(pixels[:, top : top + 32, left : left + 32])
        np.testing.assert_allclose(
            clip_pixels(to_pil(images), 32, center=round)[0].numpy(), expected, rtol=0, atol=1e-6
        )

    @pytest.mark.parametrize("size", SIZES)
    def test_bilinear_equals_pil_on_floats(self, size):
        images = pictures(2, *size)
        short = min(size)
        height, width = (int(32 * edge / short) for edge in size)
        top, left = round((height - 32) / 2), round((width - 32) / 2)
        expected = resized(images, height, width, Image.Resampling.BILINEAR)[..., top : top + 32, left : left + 32]
        np.testing.assert_allclose(clip_pixels_bilinear(images, 32).numpy(), normalized(expected), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("size", SIZES)
    def test_hps_fits_the_longer_edge_and_pads_with_black(self, size):
        images = pictures(2, *size)
        height, width = (round(edge * 32 / max(size)) for edge in size)
        above, left = (32 - height) // 2, (32 - width) // 2
        expected = np.zeros((2, 3, 32, 32))
        small = images.numpy() if size == (32, 32) else resized(images, height, width, Image.Resampling.BICUBIC)
        expected[..., above : above + height, left : left + width] = small
        np.testing.assert_allclose(hps_pixels(images, 32).numpy(), normalized(expected), rtol=0, atol=1e-5)

    def test_bytes_are_rounded_and_cut(self):
        values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2, -0.1])
        images = values.view(1, 1, 1, 6).expand(1, 3, 1, 6)
        assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255, 0]
        assert to_pil(images)[0].size == (6, 1)


class TestValues:
    @pytest.mark.parametrize("size", SIZES[:3])
    def test_pickscore(self, build, folder, size):
        images = pictures(5, *size)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        pixels = processor(to_pil(images), return_tensors="pt")["pixel_values"]
        image, text, scale = reference_features(folder, pixels, PROMPTS)
        assert scale == pytest.approx(100)
        expected = scale * (image * text).sum(-1) / 26
        assert build("pickscore")(images, PROMPTS) == pytest.approx(expected.tolist(), abs=2e-5)
        assert expected.std() > 0.05  # the images and texts matter

    @pytest.mark.parametrize("size", SIZES[:3])
    def test_clipscore(self, build, folder, size):
        images = pictures(5, *size)
        image, text, scale = reference_features(folder, clip_pixels_bilinear(images.double(), 32), PROMPTS)
        expected = (scale * image @ text.T).diagonal() / 100
        assert build("clipscore")(images, PROMPTS) == pytest.approx(expected.tolist(), abs=1e-5)

    @pytest.mark.parametrize("size", SIZES[:3])
    def test_aesthetic(self, build, folder, size):
        images = pictures(5, *size)
        x = reference_features(folder, clip_pixels(to_pil(images), 32))
        weights = torch.load(folder / "aesthetic-model.pth", weights_only=True)
        for index in (0, 2, 4, 6, 7):
            x = x @ weights[f"layers.{index}.weight"].double().T + weights[f"layers.{index}.bias"].double()
        assert build("aesthetic")(images, PROMPTS) == pytest.approx(x.flatten().tolist(), abs=1e-5)
        assert build("aesthetic")(images, PROMPTS[::-1]) == build("aesthetic")(images, PROMPTS)

    @pytest.mark.parametrize("file", ["HPS_v2.1_compressed.pt", "hps.safetensors"])
    def test_hpsv2(self, build, folder, file):
        images = pictures(5, 40, 67)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        model = OpenCLIP().double()
        with torch.no_grad():
            image = model.visual(hps_pixels(images, 28).double())
            text = model.encode_text(tokens["input_ids"])
        expected = torch.cosine_similarity(image, text, dim=-1)
        scores = build("hpsv2", model_name_or_path=folder / file)(images, PROMPTS)
        assert scores == pytest.approx(expected.tolist(), abs=1e-5)
        assert expected.std() > 0.05


class TestOpenCLIP:
    """OpenCLIP's weights in transformers' CLIP."""

    def test_features_are_equal(self):
        model = OpenCLIP(seed=3).eval()
        weights = model.state_dict()
        clip = from_weights(CLIPModel, config_of(weights), from_open_clip(weights), "hpsv2").eval()
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(3, 3, 28, 28, generator=generator)
        last = model.token_embedding.num_embeddings - 1
        tokens = torch.randint(1, last, (3, 12), generator=generator)
        for row, length in enumerate((12, 5, 8)):
            tokens[row, length - 1], tokens[row, length:] = last, 0
        with torch.no_grad():
            image = clip.get_image_features(pixels).pooler_output
            text = clip.get_text_features(tokens).pooler_output
            torch.testing.assert_close(image, model.visual(pixels), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(text, model.encode_text(tokens), rtol=1e-4, atol=1e-4)
        assert clip.logit_scale.item() == model.logit_scale.item()

    def test_config_of_the_real_architecture(self):
        """Shapes of ViT-H-14 as OpenCLIP's model card has them, without memory for the weights."""
        shapes = {
            "visual.conv1.weight": (1280, 3, 14, 14),
            "visual.positional_embedding": (257, 1280),
            "token_embedding.weight": (49408, 1024),
            "positional_embedding": (77, 1024),
            "text_projection": (1024, 1024),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
            "transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        }
        shapes |= {f"visual.transformer.resblocks.{i}.ln_1.bias": (1280,) for i in range(32)}
        shapes |= {f"transformer.resblocks.{i}.ln_1.bias": (1024,) for i in range(24)}
        config = config_of({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        vision, text = config.vision_config, config.text_config
        assert (vision.image_size, vision.num_hidden_layers, vision.num_attention_heads) == (224, 32, 16)
        assert (text.num_hidden_layers, text.num_attention_heads, text.eos_token_id) == (24, 16, 49407)
        assert (config.projection_dim, vision.hidden_act, text.hidden_act) == (1024, "gelu", "gelu")

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda w: w.pop("ln_final.bias"), r"missing: text_model.final_layer_norm.bias \(1\)"),
            (lambda w: w.update({"visual.new": torch.zeros(1)}), r"unexpected: visual.new \(1\)"),
            (lambda w: w.update({"visual.proj": torch.zeros(240, 9)}), "mismatched: .*visual_projection.weight"),
        ],
    )
    def test_weights_that_do_not_fit(self, change, message):
        weights = OpenCLIP().state_dict()
        change(weights)
        with pytest.raises(ValueError, match=f"hpsv2: the weights do not fit CLIPModel: {message}"):
            from_weights(CLIPModel, config_of(weights), from_open_clip(weights), "hpsv2")


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "aesthetic"])
class TestEveryOne:
    def test_batches_do_not_matter(self, build, name):
        images = pictures(5, 40, 40)
        scores = [build(name, batch_size=size)(images, PROMPTS) for size in (1, 2, 5)]
        assert scores[0] == pytest.approx(scores[2], abs=1e-5)
        assert scores[1] == pytest.approx(scores[2], abs=1e-5)
        assert len({round(score, 4) for score in scores[0]}) == 5

    def test_frees_and_loads_again(self, build, name):
        reward = build(name)
        first = reward(pictures(2, 40, 40), PROMPTS[:2])
        assert reward.free().models == {}
        assert reward(pictures(2, 40, 40), PROMPTS[:2]) == first

    def test_dtype(self, build, name):
        images = pictures(5, 40, 40)
        full, half = build(name)(images, PROMPTS), build(name, dtype="bfloat16")(images, PROMPTS)
        assert full != half and full == pytest.approx(half, abs=0.05 * max(map(abs, full)))
        moved = build(name, dtype=torch.bfloat16).load().to(dtype=torch.float32)
        assert moved(images, PROMPTS) == full, "loaded anew: what was rounded stays rounded"
        assert {p.dtype for p in moved.models["clip"].parameters()} == {torch.float32}
        again = build(name).to(dtype="bfloat16")(images, PROMPTS)
        assert again == half

    def test_half_precision_leaves_the_scale_as_it_is(self, build, name):
        reward = build(name, dtype="bfloat16").load()
        assert {p.dtype for p in reward.models["clip"].parameters()} == {torch.bfloat16}
        expected = {"pickscore": 100, "clipscore": 1}.get(name)
        assert reward.models.get("scale") == (expected and pytest.approx(expected, rel=1e-6))

    def test_a_missing_folder(self, build, name, tmp_path):
        with pytest.raises(SourceError, match=f"{name}: there is no .*missing"):
            build(name, model_name_or_path=tmp_path / "missing").load()


def test_the_head_has_the_published_names():
    assert list(ScoreHead().state_dict()) == [
        f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")
    ]
    assert ScoreHead()(torch.zeros(3, 768)).shape == (3,)


def test_a_pickle_with_code_is_not_run(folder, tmp_path, build):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    with open(tmp_path / "aesthetic-model.pth", "wb") as file:
        pickle.dump({"layers.0.weight": Trap()}, file, protocol=2)
    with pytest.raises(ValueError, match="'aesthetic-model.pth' is a pickle with more than tensors in it"):
        build("aesthetic", predictor_name_or_path=tmp_path).load()
    assert not (tmp_path / "ran").exists()
