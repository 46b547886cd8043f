# SPDX-License-Identifier: Apache-2.0
"""Scores that others published for images that can be fetched, to compare the rewards with; no image is kept here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """
    Scores that somebody published, in the scale of our reward.

    Args:
        images (`tuple[str, ...]`):
            Addresses of the images.
        prompt (`str`):
            What they are scored with.
        scores (`tuple[float, ...]`):
            One per image.
        tolerance (`float`):
            Largest difference that passes.
        source (`str`):
            Address of the publication.
    """

    images: tuple[str, ...]
    prompt: str
    scores: tuple[float, ...]
    tolerance: float
    source: str


_IMAGEREWARD = "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images"
_OCEAN = tuple(f"{_IMAGEREWARD}/{number}.webp" for number in range(1, 5))
_OCEAN_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
# Apache-2.0. Its scores of ImageReward differ from the authors' by 0.003 at most.
_DIFFSYNTH = (
    "https://github.com/modelscope/DiffSynth-Studio/blob/641dde55c41fb0360db2c265f9a9959e3bebd5ad/examples/QualityMetric/"
    "README.md"
)
# MIT.
_SHUNK = "shunk031/simple-aesthetics-predictor"
_SHUNK_COMMIT = "717b9412258688ba0d5951d5b8ea764f6aab5afe"
_HPSV3 = "https://raw.githubusercontent.com/MizzenAI/HPSv3/d232ff8669a0b00759766067c6c3a26e2e717fac/assets"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    # Published as a cosine, of which ours is 100 / 26 times.
    "pickscore": (
        Published(
            _OCEAN,
            _OCEAN_PROMPT,
            tuple(cosine * 100 / 26 for cosine in (0.207371, 0.204436, 0.206608, 0.194261)),
            0.005,
            _DIFFSYNTH,
        ),
    ),
    "hpsv2": (Published(_OCEAN, _OCEAN_PROMPT, (0.232114, 0.202337, 0.197829, 0.192302), 0.005, _DIFFSYNTH),),
    "aesthetic": (
        Published(_OCEAN, _OCEAN_PROMPT, (5.900863, 5.776571, 5.799864, 5.052050), 0.05, _DIFFSYNTH),
        Published(
            (
                f"https://raw.githubusercontent.com/{_SHUNK}/{_SHUNK_COMMIT}/assets/"
                "a-photo-of-an-astronaut-riding-a-horse.png",
            ),
            "a photo of an astronaut riding a horse",
            (5.7546,),
            0.1,
            f"https://github.com/{_SHUNK}/blob/{_SHUNK_COMMIT}/tests/aesthetics_predictor_v2_test.py",
        ),
    ),
    "imagereward": (
        Published(
            _OCEAN,
            _OCEAN_PROMPT,
            (0.581162, 0.274528, -1.413182, -2.029570),
            0.02,
            "https://github.com/THUDM/ImageReward#example-use",
        ),
    ),
    # By the authors' code with transformers 4.45.2 in bfloat16.
    "hpsv3": (
        Published(
            (f"{_HPSV3}/example1.png", f"{_HPSV3}/example2.png"),
            "cute chibi anime cartoon fox, smiling wagging tail with a small cartoon heart above sticker",
            (10.823, 7.163),
            0.25,
            "https://github.com/Andrei3223/HPSv3_xai/blob/e8d29edfe84ef469f16a209554828930f3ca4eae/results/xai_24135564/"
            "REPORT.md",
        ),
    ),
}
# Why there is nothing to compare the others with.
UNPUBLISHED = {
    "geneval": "no judged image was found, and its published means are of another detector",
    "ocr": "its published means are of another engine",
    "clipscore": "the scores that were found are of another CLIP, ViT-H/14",
    "unifiedreward": "its published scores are of another model and instruction",
    "geneval2": "its published means are over images that were not published",
}
