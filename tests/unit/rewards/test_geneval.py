# SPDX-License-Identifier: Apache-2.0
"""GenEval: the rules on made-up detections, the detector's rule for instances, the prompts, and the whole path."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
)
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from tests.support.tiny_geneval import save_tiny_models
from trl_diffusion_opd.rewards import check, load_reward
from trl_diffusion_opd.rewards.detector import IMAGENET_STD, detect, detector_pixels, detector_size, find_instances
from trl_diffusion_opd.rewards.geneval import GenEvalReward, crop
from trl_diffusion_opd.rewards.geneval_prompts import geneval_prompts, metadata_column
from trl_diffusion_opd.rewards.geneval_rules import (
    CLASSES,
    COLORS,
    Detection,
    is_correct,
    keep_objects,
    objects_to_color,
    parse_metadata,
    partial_score,
    relative_position,
    summarize,
)
from trl_diffusion_opd.rewards.sums import weighted_sum


def found(name, score=0.95, box=(0, 0, 10, 10), color=None):
    return Detection(CLASSES.index(name), score, box, color=color)


def want(tag, *include, exclude=()):
    def clause(name, count=1, color=None, position=None):
        return {"class": name, "count": count, "color": color, "position": position}

    return parse_metadata(
        {"tag": tag, "include": [clause(*args) for args in include], "exclude": [clause(*args) for args in exclude]}
    )


def test_classes_are_those_of_coco_with_three_other_names():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert (CLASSES[0], CLASSES[16], CLASSES[79]) == ("person", "dog", "toothbrush")
    assert CLASSES[62:68] == ("tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone")


def test_objects_are_kept_above_the_threshold_of_their_tag_and_sixteen_per_class():
    detections = [found("dog", score) for score in (0.2, 0.3, 0.31, 0.9, 0.91)] + [found("cat", 0.3)]
    assert [d.score for d in keep_objects(detections, "two_object")["dog"]] == [0.91, 0.9, 0.31]
    assert [d.score for d in keep_objects(detections, "counting")["dog"]] == [0.91]
    assert "cat" not in keep_objects(detections, "two_object")
    many = [found("dog", 0.4 + i / 100) for i in range(20)]
    assert [d.score for d in keep_objects(many, "colors")["dog"]] == [0.4 + i / 100 for i in range(19, 3, -1)]


DOG = want("single_object", ("dog",))
DOG_AND_CAT = want("two_object", ("dog",), ("cat",))
FOUR_DOGS = want("counting", ("dog", 4), exclude=[("dog", 5)])
RED_CAR = want("colors", ("car", 1, "red"))
TWO_RED_CARS = want("colors", ("car", 2, "red"))
DOG_LEFT_OF_CAT = want("position", ("cat",), ("dog", 1, None, ["left of", 0]))
DOG_LEFT_OF_TWO_CATS = want("position", ("cat", 2), ("dog", 1, None, ["left of", 0]))
RED_CAR_BLUE_BUS = want("color_attr", ("car", 1, "red"), ("bus", 1, "blue"))

CAT = found("cat", box=(50, 0, 60, 10))
LEFT, RIGHT = found("dog", box=(0, 0, 10, 10)), found("dog", box=(90, 0, 99, 10))
RED, BLUE = (found("car", 0.9 if color == "red" else 0.8, color=color) for color in ("red", "blue"))
BLUE_BUS, RED_BUS = (found("bus", color=color) for color in ("blue", "red"))
dog = found("dog")


@pytest.mark.parametrize(
    "demand, detections, correct, partial, exact",
    [
        (DOG, [dog], True, 1.0, True),
        (DOG, [], False, 0.0, False),
        (DOG, [found("cat")], False, 0.0, False),
        (DOG, [dog] * 2, True, 0.0, False),  # more than asked for: right for the benchmark
        (DOG, [dog] * 3, True, -1.0, False),
        (DOG_AND_CAT, [dog, CAT], True, 1.0, True),
        (DOG_AND_CAT, [dog], False, 0.5, False),
        (DOG_AND_CAT, [dog, CAT, CAT, CAT], True, 0.0, False),  # 1 and -1
        (FOUR_DOGS, [dog] * 4, True, 1.0, True),
        (FOUR_DOGS, [dog] * 3, False, 0.75, False),
        (FOUR_DOGS, [dog] * 5, False, 0.75, False),  # the exclude clause
        (FOUR_DOGS, [dog] * 9, False, -0.25, False),
        (FOUR_DOGS, [dog] * 16, False, -2.0, False),
        (FOUR_DOGS, [dog] * 4 + [CAT] * 7, True, 1.0, True),
        (RED_CAR, [RED], True, 1.0, True),
        (RED_CAR, [BLUE], False, 0.5, False),
        (RED_CAR, [], False, 0.0, False),  # 0 and 0
        (RED_CAR, [RED, BLUE], True, 0.0, False),  # the more confident one is red; 0 and 0
        (RED_CAR, [BLUE, found("car", 0.7, color="red")], False, 0.0, False),
        (RED_CAR, [RED] * 3, True, -0.5, False),  # -1 and 0
        (TWO_RED_CARS, [RED, RED], True, 1.0, True),
        (TWO_RED_CARS, [RED, BLUE], False, 0.75, False),  # 1 and 1/2
        (TWO_RED_CARS, [BLUE, BLUE], False, 0.5, False),
        (TWO_RED_CARS, [RED], False, 0.25, False),  # 1/2 and 0
        (DOG_LEFT_OF_CAT, [CAT, LEFT], True, 1.0, True),
        (DOG_LEFT_OF_CAT, [CAT, RIGHT], False, 0.75, False),  # 1, 1, 0 and the 1 of the quirk
        (DOG_LEFT_OF_CAT, [CAT], False, 1 / 3, False),  # 1, 0, 0
        (DOG_LEFT_OF_CAT, [LEFT], False, 1 / 3, False),  # 0, 1, 0
        (DOG_LEFT_OF_CAT, [], False, 0.0, False),
        (DOG_LEFT_OF_CAT, [CAT, CAT, LEFT], True, 1 / 3, False),  # 0, 1, 0: two cats are no target
        (DOG_LEFT_OF_TWO_CATS, [CAT, CAT, LEFT], True, 1.0, True),
        (
            DOG_LEFT_OF_TWO_CATS,
            [CAT, found("cat", box=(0, 50, 10, 60)), LEFT],
            False,
            0.75,
            False,
        ),  # one pair is wrong
        (RED_CAR_BLUE_BUS, [RED, BLUE_BUS], True, 1.0, True),
        (RED_CAR_BLUE_BUS, [RED, RED_BUS], False, 0.75, False),
        (RED_CAR_BLUE_BUS, [BLUE, RED_BUS], False, 0.5, False),
        (RED_CAR_BLUE_BUS, [RED], False, 0.5, False),  # 1, 1, 0, 0
    ],
)
def test_rules(demand, detections, correct, partial, exact):
    objects = keep_objects(detections, "colors")
    assert is_correct(objects, demand) is correct
    assert partial_score(objects, demand) == (pytest.approx(partial), exact)


def test_without_the_quirk_a_wrong_position_costs_all_of_its_part():
    objects = keep_objects([CAT, RIGHT], "position")
    assert partial_score(objects, DOG_LEFT_OF_CAT, position_quirk=False) == (pytest.approx(2 / 3), False)
    objects = keep_objects([CAT, LEFT], "position")
    assert partial_score(objects, DOG_LEFT_OF_CAT, position_quirk=False) == (1.0, True)


@pytest.mark.parametrize(
    "box, expected",
    [
        # The target is 10 x 10 at the origin, so that a shift of (10 + 10) * 0.1 = 2 is tolerated.
        ((-2, 0, 8, 10), set()),
        ((-2.0005, 0, 7.9995, 10), set()),  # the rest of the shift is below 1e-3
        ((-4, 0, 6, 10), set()),  # (4 - 2) / 4 is not above 0.5
        ((-4.1, 0, 5.9, 10), {"left of"}),
        ((4.1, 0, 14.1, 10), {"right of"}),
        ((0, -30, 10, -20), {"above"}),
        ((0, 30, 10, 40), {"below"}),
        ((10, 10, 20, 20), {"right of", "below"}),  # (8, 8) / |(10, 10)| = 0.57 each
        ((-30, 9, -20, 19), {"left of"}),  # (28, 7) / |(30, 9)|
        ((0, 0, 10, 10), set()),  # no division by zero
        ((-40, -40, 50, 50), set()),
    ],
)
def test_relative_position(box, expected):
    assert relative_position(box, (0, 0, 10, 10)) == expected


def test_colors_are_asked_only_where_they_decide():
    objects = keep_objects([RED, BLUE, found("bus", 0.5), dog], "color_attr")
    assert objects_to_color(objects, RED_CAR_BLUE_BUS) == [objects["car"][0], objects["bus"][0]]
    assert objects_to_color(objects, TWO_RED_CARS) == objects["car"]
    assert objects_to_color(objects, want("colors", ("car", 3, "red"))) == []
    assert objects_to_color(objects, DOG) == []


def test_metadata_is_read_from_text_and_from_columns():
    line = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "exclude": []}
    assert parse_metadata(json.dumps(line)) == parse_metadata({**line, "exclude": None, "prompt": "..."}) == line
    arrow = {"class": "car", "count": 1, "color": "red", "position": None}
    assert parse_metadata({"tag": "colors", "include": [arrow]}) == line


@pytest.mark.parametrize(
    "clause, tag, message",
    [
        ({"class": "unicorn", "count": 1}, "colors", "the class 'unicorn'"),
        ({"class": "car", "count": 1, "color": "gray"}, "colors", "the color 'gray'"),
        ({"class": "car", "count": 1, "position": ["under", 0]}, "colors", "the position 'under'"),
        ({"class": "car", "count": 1, "position": ["below", 0]}, "colors", "refer to a clause before"),
        ({"class": "car", "count": 0}, "colors", "at least 1"),
        ({"class": "car", "count": 1}, "size", "a `tag` of"),
    ],
)
def test_wrong_metadata_is_told(clause, tag, message):
    with pytest.raises(ValueError, match=message):
        parse_metadata({"tag": tag, "include": [clause]})


def test_summary_has_the_mean_over_tags_and_the_mean_over_images():
    tags = ["position", "counting", "position", "position", "colors"]
    assert summarize(tags, [1.0, 0.0, 0.0, math.nan, 1]) == {
        "counting": 0.0,
        "colors": 1.0,
        "position": 0.5,
        "score": 0.5,
        "accuracy": 0.5,
        "num_failed": 1,
    }
    assert summarize(["colors", "colors", "counting"], [1, 1, 0])["score"] == 0.5
    assert summarize(["colors", "colors", "counting"], [1, 1, 0])["accuracy"] == pytest.approx(2 / 3)
    assert math.isnan(summarize(["colors"], [math.nan])["score"])


def test_the_default_prompts_are_those_of_the_benchmark():
    rows = geneval_prompts()
    numbers = {tag: sum(row["tag"] == tag for row in rows) for tag in {row["tag"] for row in rows}}
    assert numbers == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert len({row["prompt"] for row in rows}) == 553
    first = {tag: next(row["prompt"] for row in rows if row["tag"] == tag) for tag in numbers}
    assert first == {
        "single_object": "a photo of a bench",
        "two_object": "a photo of a bench and a sports ball",
        "counting": "a photo of two clocks",
        "colors": "a photo of a blue fire hydrant",
        "position": "a photo of a dog right of a teddy bear",
        "color_attr": "a photo of a purple wine glass and a black apple",
    }
    by_prompt = {row["prompt"]: row for row in rows}
    assert {"a photo of four benchs", "a photo of two toothbrushs", "a photo of two wine glasses"} < by_prompt.keys()
    assert by_prompt["a photo of a chair left of a zebra"]["include"] == [
        {"class": "zebra", "count": 1},
        {"class": "chair", "count": 1, "position": ["left of", 0]},
    ]
    assert by_prompt["a photo of two tv remotes"] == {
        "prompt": "a photo of two tv remotes",
        "tag": "counting",
        "include": [{"class": "tv remote", "count": 2}],
        "exclude": [{"class": "tv remote", "count": 3}],
    }
    assert by_prompt["a photo of a green surfboard and an orange oven"]["include"] == [
        {"class": "surfboard", "count": 1, "color": "green"},
        {"class": "oven", "count": 1, "color": "orange"},
    ]


def test_prompts_for_training():
    held_out = {row["prompt"] for row in geneval_prompts()}
    nums = {"position": 300, "counting": 1000}
    rows = geneval_prompts(nums, seed=0, unique=False, without=held_out)
    assert {row["tag"] for row in rows} == set(nums) and not held_out & {row["prompt"] for row in rows}
    counting = [row["prompt"] for row in rows if row["tag"] == "counting"]
    assert len(counting) > 500 and len(set(counting)) <= 240 - 80
    assert len(geneval_prompts({"counting": 5000}, seed=1)) == 240  # 80 classes, 2 to 4: all of them
    assert not any("person" in row["prompt"] for row in geneval_prompts({"colors": 2000, "color_attr": 2000}))
    assert rows == geneval_prompts(nums, seed=0, unique=False, without=held_out)
    for text, row in zip(metadata_column(rows), rows, strict=True):
        assert parse_metadata(text)["include"] == row["include"] and json.loads(text)["tag"] == row["tag"]
    with pytest.raises(ValueError, match="'colours'"):
        geneval_prompts({"colours": 3})


def bilinear(image, height, width):
    """Pixel by pixel, centers at half a pixel."""
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * image.shape[0] / height - 0.5, 0)
            u = max((x + 0.5) * image.shape[1] / width - 0.5, 0)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
            a, b = v - y0, u - x0
            out[y, x] = (
                (1 - a) * (1 - b) * image[y0, x0]
                + (1 - a) * b * image[y0, x1]
                + a * (1 - b) * image[y1, x0]
                + a * b * image[y1, x1]
            )
    return out


def slow_instances(class_logits, mask_logits, padded, resized, original, num=100):
    """mmdet's rule in loops: (label, score, box, mask) of the likeliest pairs, most confident first."""
    pairs = []
    for query, logits in enumerate(class_logits):
        exponentials = [math.exp(logit) for logit in logits]
        for label in range(len(logits) - 1):
            pairs.append((exponentials[label] / sum(exponentials), query, label))
    instances = []
    for probability, query, label in sorted(pairs, reverse=True)[:num]:
        logits = bilinear(bilinear(mask_logits[query], *padded)[: resized[0], : resized[1]], *original)
        inside = [(y, x) for y in range(original[0]) for x in range(original[1]) if logits[y, x] > 0]
        if inside:
            ys, xs = zip(*inside, strict=True)
            mean = sum(1 / (1 + math.exp(-logits[y, x])) for y, x in inside) / len(inside)
            box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
            instances.append((label, probability * mean, box, logits > 0))
    return sorted(instances, key=lambda instance: -instance[1])


@pytest.mark.parametrize(
    "num_queries, num_classes, min_score", [(5, 4, 0.0), (5, 4, 0.25), (30, 5, 0.0)], ids=["all", "best", "over 100"]
)
def test_instances_are_those_of_the_slow_rule(num_queries, num_classes, min_score):
    generator = torch.Generator().manual_seed(num_queries)
    class_logits = torch.randn(num_queries, num_classes + 1, generator=generator, dtype=torch.float64) * 2
    mask_logits = torch.randn(num_queries, 4, 3, generator=generator, dtype=torch.float64)
    mask_logits[1] = -mask_logits[1].abs()  # an empty mask
    sizes = {"padded": (8, 6), "resized": (7, 6), "original": (5, 9)}
    fast = find_instances(class_logits, mask_logits, **sizes, min_score=min_score)
    slow = slow_instances(class_logits.numpy(), mask_logits.numpy(), **sizes)
    slow = [instance for instance in slow if instance[1] > min_score]
    assert len(fast) == len(slow) > 0
    if num_queries == 30:
        assert len(fast) > 80 and num_queries * num_classes > 100
    for detection, (label, score, box, mask) in zip(fast, slow, strict=True):
        assert (detection.label, detection.box) == (label, box)
        assert detection.score == pytest.approx(score, rel=1e-5)
        assert (detection.mask == mask).all()


def test_nothing_is_found_where_nothing_is_likely():
    sizes = {"padded": (8, 8), "resized": (8, 8), "original": (8, 8)}
    unlikely = torch.tensor([[0.0, 0.0, 9.0]])
    assert find_instances(unlikely, torch.ones(1, 2, 2), **sizes, min_score=0.3) == []
    likely = torch.tensor([[9.0, 0.0, 0.0]])
    assert find_instances(likely, -torch.ones(1, 2, 2), **sizes, min_score=0.3) == []
    # Class 0 with probability 0.9998, sigmoid(1) = 0.731 at every pixel.
    (detection,) = find_instances(likely, torch.ones(1, 2, 2), **sizes, min_score=0.3)
    assert detection.score == pytest.approx(0.9998 * 0.7311, abs=1e-4) and detection.box == (0, 0, 8, 8)


def test_detector_sizes():
    assert detector_size(512, 512) == (800, 800)
    assert detector_size(1024, 512) == (1333, 667)
    assert detector_size(480, 640) == (800, 1067)


def test_detector_pixels_are_those_of_transformers():
    # Multiples of 32: to these transformers stretches what we pad.
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32)
    images = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    expected = torch.as_tensor(np.stack(processor(pictures)["pixel_values"]))
    pixels = detector_pixels(images, detector_size(20, 30, 64))
    assert pixels.shape == expected.shape == (2, 3, 64, 96)
    # One level of the bytes that both round to.
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.01 / 255 / min(IMAGENET_STD))


def test_detector_pixels_are_padded_to_multiples_of_32():
    images = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0)) / 4 + 0.7
    pixels = detector_pixels(images, (40, 48))
    assert pixels.shape == (1, 3, 64, 64)
    assert (pixels[..., 40:, :] == 0).all() and (pixels[..., 48:] == 0).all()
    assert (pixels[..., :40, :48] > 0).all()


def test_a_crop_is_the_object_on_gray():
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = mask[2, 3] = True
    cropped = np.asarray(crop(picture, Detection(0, 1.0, (2.0, 1.0, 4.0, 3.0), mask)))
    assert cropped.tolist() == [
        [picture[1, 2].tolist(), [0x99] * 3],
        [[0x99] * 3, picture[2, 3].tolist()],
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    save_tiny_models(folder)
    return {
        "model_name_or_path": folder / "detector",
        "clip_name_or_path": folder / "clip",
        "shortest_edge": 64,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def images():
    pictures = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(pictures, (48, 48), mode="bicubic").clamp(0, 1)


def demand(tag, **clause):
    return json.dumps({"tag": tag, "include": [{"class": "dog", **clause}]})


def dogs_by_hand(reward, images):
    """Dogs of each image above 0.3: the detector of the reward, the slow rule."""
    detector = reward.models["detector"]
    dogs = []
    for image in images:
        with torch.no_grad():
            output = detector(pixel_values=detector_pixels(image[None], (64, 64)))
        class_logits, mask_logits = output.class_queries_logits[0], output.masks_queries_logits[0]
        instances = slow_instances(class_logits.numpy(), mask_logits.numpy(), (64, 64), (64, 64), (48, 48), num=3)
        dogs.append([instance for instance in instances if instance[1] > 0.3])
        assert all(CLASSES[label] == "dog" for label, *_ in instances)
    return dogs


def color_by_hand(reward, image, instance):
    """The color of one object, by the pieces of transformers."""
    clip, tokenizer = reward.models["colors"].clip, reward.models["colors"].tokenizer
    _, _, box, mask = instance
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    gray = Image.new("RGB", picture.size, "#999")
    cropped = Image.composite(picture, gray, Image.fromarray(mask)).crop(box)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = torch.as_tensor(np.stack(processor([cropped])["pixel_values"]))
    with torch.no_grad():
        seen = clip.get_image_features(pixels).pooler_output[0]
        similarities = []
        for color in COLORS:
            texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
            said = [clip.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0] for t in texts]
            mean = sum(text / text.norm() for text in said) / 3
            own = reward.models["colors"].text_features("dog")[COLORS.index(color)]
            torch.testing.assert_close(own, mean / mean.norm(), rtol=0, atol=1e-5)
            similarities.append(torch.nn.functional.cosine_similarity(seen, mean, dim=0).item())
    return COLORS[int(np.argmax(similarities))]


def test_the_whole_path_on_tiny_models(tiny, images):
    reward = load_reward("geneval", **tiny, batch_size=3)
    assert reward.models == {} and reward.columns_needed == ("metadata",)
    three = [demand("single_object", count=3)] * 4
    scores = reward(images, ["three dogs"] * 4, metadata=three)
    dogs = dogs_by_hand(reward, images)
    numbers = [len(group) for group in dogs]
    assert max(numbers) == 3, "this test needs a detector that finds something"
    assert scores == pytest.approx([1 - (3 - number) / 3 for number in numbers])
    one_by_one = [reward(images[i : i + 1], ["three dogs"], metadata=three[:1])[0] for i in range(4)]
    assert one_by_one == scores

    # The color that is found, and another one: strict and partial.
    strict = load_reward("geneval", **tiny, strict=True)
    for image, group in zip(images, dogs, strict=True):
        color = color_by_hand(reward, image, group[0])
        other = COLORS[COLORS.index(color) - 1]
        columns = {"metadata": [demand("colors", count=1, color=c) for c in (color, other)]}
        assert strict(image.expand(2, -1, -1, -1), [""] * 2, **columns) == [1.0, 0.0]
        if len(group) == 1:
            assert reward(image.expand(2, -1, -1, -1), [""] * 2, **columns) == [1.0, 0.5]
    # No dog is as sure as counting wants it: the mean inside its mask is below 0.9.
    assert max(score for group in dogs for _, score, *_ in group) < 0.9
    assert strict(images, [""] * 4, metadata=[demand("counting", count=1)] * 4) == [0.0] * 4
    assert (reward.num_failed, strict.num_failed, strict.num_scored) == (0, 0, 12)


def test_its_own_files_are_datasets(tiny, images):
    rows = geneval_prompts(1)[:4]
    columns = {name: [row.get(name) for row in rows] for name in ("tag", "include", "exclude")}
    reward = load_reward("geneval", **tiny)
    assert reward.missing_columns(columns) == [] and reward.missing_columns(["prompt", "tag"]) == ["metadata"]
    expected = reward(images, [""] * 4, metadata=metadata_column(rows))
    assert reward(images, [""] * 4, **columns) == expected
    both = weighted_sum({reward: 2.0})
    assert both(images, [""] * 4, **columns) == pytest.approx([2 * score for score in expected])


def test_colors_differ_among_objects(tiny):
    reward = load_reward("geneval", **tiny).load()
    plain = [Image.new("RGB", (20, 30), color) for color in ("red", "green", "blue", "white", "black", "yellow")]
    with torch.no_grad():
        named = reward.models["colors"](plain, ["dog"] * 6)
        assert [reward.models["colors"]([picture], ["dog"])[0] for picture in plain] == named
        assert not torch.equal(
            reward.models["colors"].text_features("dog"), reward.models["colors"].text_features("cat")
        )
    assert len(set(named)) > 1, "this test needs a CLIP that tells colors apart"


def test_an_image_that_is_not_finite_is_failed(tiny, images):
    reward = load_reward("geneval", **tiny)
    broken = images.clone()
    broken[1, 0, 5, 5] = math.nan
    broken[2, 1, 7, 7] = math.inf
    metadata = [demand("single_object", count=3)] * 4
    scores, whole = (reward(pixels, [""] * 4, metadata=metadata) for pixels in (broken, images))
    assert math.isnan(scores[1]) and math.isnan(scores[2]) and (scores[0], scores[3]) == (whole[0], whole[3])
    assert (reward.num_failed, reward.num_scored) == (2, 6)


@pytest.mark.parametrize("sees", ["kites", "dogs"])
def test_check_asks_for_objects_and_colors(tiny, monkeypatch, tmp_path, sees):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), "blue").save(photo)
    monkeypatch.setattr(check, "CATS", photo.as_uri())
    reward = load_reward("geneval", **tiny)
    if sees == "kites":  # a detector of random weights sees neither cats nor, here, dogs
        with torch.no_grad():
            reward.load().models["detector"].class_predictor.bias[CLASSES.index("dog")] = 0.0
    line, unpublished = check.check_rewards([reward])
    assert unpublished.status == check.NONE_PUBLISHED
    assert (line.name, line.status, line.expected) == (
        "geneval",
        "differs",
        "0.5 or more, 0; red, green, blue, yellow",
    )
    cats, dog = map(float, line.score.split(", "))
    assert cats == 0 and (dog == 0) == (sees == "kites")


@pytest.mark.parametrize("wrong", [None, "cats", "dog", "colors"])
def test_check_passes_if_all_three_are_right(tiny, monkeypatch, tmp_path, wrong):
    class Knowing(GenEvalReward):
        def score(self, images, prompts, *, metadata):
            return [0.4 if wrong == "cats" else 0.75, 0.5 if wrong == "dog" else 0.0]

        def load_models(self):
            names = ["red", "green", "blue", "pink" if wrong == "colors" else "yellow"]
            return {**super().load_models(), "colors": lambda crops, words: names}

    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), "blue").save(photo)
    monkeypatch.setattr(check, "CATS", photo.as_uri())
    line, unpublished = check.check_rewards([Knowing(**tiny)])
    assert unpublished.status == check.NONE_PUBLISHED
    assert line.status == ("ok" if wrong is None else "differs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(tiny, images, dtype):
    reward = load_reward("geneval", **tiny, dtype=dtype, strict=True).load()
    for name in ("detector", "colors"):
        assert {p.dtype for p in reward.models[name].parameters()} == {dtype}
        assert not any(p.requires_grad for p in reward.models[name].parameters())
    metadata = [demand("colors", count=1, color=color) for color in ("red", "green", "blue", "pink")]
    scores = reward(images, [""] * 4, metadata=metadata)
    assert set(scores) <= {0.0, 1.0} and reward.num_failed == 0
    if dtype == torch.float64:
        assert scores == load_reward("geneval", **tiny, strict=True)(images, [""] * 4, metadata=metadata)


def test_columns_and_detectors_that_do_not_fit_are_told(tiny, images):
    reward = load_reward("geneval", **tiny)
    with pytest.raises(ValueError, match="'metadata'"):
        reward(images, [""] * 4)
    reward.load().models["detector"].config.num_labels = 150
    with pytest.raises(ValueError, match="the 80 classes of COCO, but has 150"):
        detect(reward.models["detector"], images, min_score=0.3, shortest_edge=64)
