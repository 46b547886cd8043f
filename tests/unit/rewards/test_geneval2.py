# SPDX-License-Identifier: Apache-2.0
"""GenEval 2: its rules, a judge behind a server, and a tiny judge that runs here."""

import base64
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.chat_server import LoopbackChat, with_probabilities
from tests.support.random_images import pictures
from trl_diffusion_opd.rewards import load_reward
from trl_diffusion_opd.rewards.chat_server import ChatServerError
from trl_diffusion_opd.rewards.geneval2_rules import (
    arithmetic_mean,
    geometric_mean,
    parse_questions,
    summarize,
)


PIGS = [
    ["How many pigs are in the image?", "two"],
    ["Are the pigs green?", "Yes"],
    ["Are there any pigs in the image?", "Yes"],
]
CAT = [["How many cats are in the image?", "one"], ["Are there any cats in the image?", "Yes"]]


class TestRules:
    def test_questions_and_their_right_answers(self):
        count, green, some = parse_questions(PIGS)
        assert count.text == "How many pigs are in the image? Answer in one word."
        assert count.answers == ("two", " two", "Two", " Two", "2", " 2")
        assert green.text == "Are the pigs green? Answer in one word." and green.answers == some.answers
        assert green.answers == ("yes", " yes", "Yes", " Yes")
        assert parse_questions(json.dumps(PIGS)) == [count, green, some]
        assert parse_questions([["How many cats?", "ten"]])[0].answers[-2:] == ("10", " 10")

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ([], "must be a list of pairs of question and answer, but is []"),
            (3, "but is 3"),
            ([["Is it green?"]], "must hold pairs of a question and its answer, but one is ['Is it green?']"),
            ([["Is it green?", True]], "but one is ['Is it green?', True]"),
            ([["Is it green?", "No"]], "knows the answers Yes to 'Is it green?', but not 'No'"),
            (
                [["How many cats?", "Yes"]],
                "knows the answers one, two, three, four, five, six, seven, eight, nine, ten to",
            ),
            ([["How many cats?", "2"]], "to 'How many cats?', but not '2'"),
        ],
    )
    def test_other_questions_are_refused(self, pairs, message):
        with pytest.raises(ValueError) as error:
            parse_questions(pairs)
        assert message in str(error.value)

    def test_means_by_hand(self):
        assert (arithmetic_mean([0.5, 0.25, 0.75]), geometric_mean([0.5, 0.5])) == (0.5, 0.5)
        assert geometric_mean([0.25, 1.0]) == pytest.approx(0.5) and geometric_mean([0.9, 0.0]) == 0
        assert geometric_mean([0.2, 0.4, 0.8]) == pytest.approx(0.4)

    def test_summary_by_hand(self):
        # GM .5 and .4, AM .625 and 1.4 / 3. Objects: 1 and .8; counts: .25 and .2; attributes: .4.
        images = [
            ([0.25, 1.0], ["count", "object"], 3),
            ([0.2, 0.4, 0.8], ["count", "attribute", "object"], 10),
        ]
        found = summarize(images)
        assert found["gm"] == pytest.approx(0.45) and found["am"] == pytest.approx((0.625 + 1.4 / 3) / 2)
        assert list(found["skills"]) == ["object", "attribute", "count"]
        assert list(found["skills"].values()) == pytest.approx([0.9, 0.4, 0.225])
        assert list(found["atoms"]) == ["3", "10"] and list(found["atoms"].values()) == pytest.approx([0.5, 0.4])
        # A skill's mean is over all answers, not over images.
        three = summarize([([1.0, 1.0], ["verb", "verb"], 4), ([0.25], ["verb"], 4)])
        assert three["skills"] == {"verb": 0.75} and three["atoms"] == {"4": pytest.approx(0.625)}
        assert summarize([]) == {"gm": None, "am": None, "skills": {}, "atoms": {}}
        assert summarize([([0.5], None, None)]) == {"gm": 0.5, "am": 0.5, "skills": {}, "atoms": {}}
        for names in (["count"], ["count", "smell"]):
            with pytest.raises(
                ValueError, match="must name one of object, attribute, count, position, verb for each of 2"
            ):
                summarize([([0.5, 0.5], names, 3)])


# A judge behind a server


def question(body: dict) -> str:
    return body["messages"][0]["content"][1]["text"].removesuffix(" Answer in one word.")


def reward_of(server: LoopbackChat, **options):
    return load_reward("geneval2", model_name_or_path="judge", base_url=server.url, device="cpu", **options)


PROBABILITIES = {
    "How many pigs are in the image?": {"Two": 0.5, "2": 0.25, " two": 0.05, "Three": 0.1, "Twofold": 0.1},
    "Are the pigs green?": {"No": 0.6, "Yes": 0.2, "yes": 0.15, "Yesterday": 0.05},
    "Are there any pigs in the image?": {"Yes": 1.0},
    "How many cats are in the image?": {"One": 0.25, "1": 0.25, " ": 0.5},
    "Are there any cats in the image?": {"No": 1.0},
}


def test_probabilities_of_a_server():
    with LoopbackChat(lambda number, body: with_probabilities(PROBABILITIES[question(body)])) as server:
        reward = reward_of(server)
        images = pictures(3, 24, 40)
        scores = reward(images, ["two green pigs", "a cat", "two pigs"], vqa_list=[PIGS, CAT, PIGS[::2]])
        parts = reward.parts
        means = reward_of(server, method="am")(images[:1], ["two green pigs"], vqa_list=[PIGS])
    assert parts[0] == pytest.approx([0.8, 0.35, 1.0]) and parts[1] == pytest.approx([0.5, 0.0])
    assert scores == pytest.approx([(0.8 * 0.35) ** (1 / 3), 0.0, 0.8**0.5])
    assert means == pytest.approx([(0.8 + 0.35 + 1.0) / 3])
    assert (reward.num_scored, reward.num_failed) == (3, 0)
    path, body = next(request for request in server.requests if question(request[1]) == CAT[0][0])
    assert path == "/v1/chat/completions"
    told = {name: body[name] for name in ("model", "temperature", "max_tokens", "logprobs", "top_logprobs")}
    assert told == {"model": "judge", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "How many cats are in the image? Answer in one word."}
    kind, data = image["image_url"]["url"].split(",")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    # The image itself, in its own size.
    assert kind == "data:image/png;base64"
    assert np.array_equal(sent, (images[1] * 255).round().byte().permute(1, 2, 0).numpy())


def test_one_question_without_an_answer_fails_the_image(caplog):
    def answer(number, body):
        return 400 if question(body) == PIGS[1][0] else with_probabilities({"Yes": 0.5, "One": 0.5, "Two": 0.25})

    with LoopbackChat(answer) as server:
        reward = reward_of(server, max_retries=0, batch_size=2)
        scores = reward(pictures(3), ["two green pigs", "a cat", "a cat"], vqa_list=[PIGS, CAT, CAT])
    assert math.isnan(scores[0]) and scores[1:] == pytest.approx([0.5, 0.5])
    assert reward.parts == [None, pytest.approx([0.5, 0.5]), pytest.approx([0.5, 0.5])]
    assert (reward.num_scored, reward.num_failed) == (2, 1) and "the server gave no answer" in caplog.text


def test_a_server_without_probabilities_ends_the_run():
    for reply in ("Yes", b'{"choices": [{"message": {"content": "Yes"}, "logprobs": null}]}'):
        with LoopbackChat(lambda number, body, reply=reply: reply) as server:
            with pytest.raises(
                ChatServerError, match=r"returns no probabilities of tokens \(`top_logprobs`\). Use one"
            ):
                reward_of(server)(pictures(1), ["a cat"], vqa_list=[CAT])


def test_settings_and_columns_that_make_no_sense():
    with pytest.raises(ValueError, match="`method` must be 'gm' or 'am', but is 'mean'"):
        load_reward("geneval2", method="mean")
    reward = load_reward("geneval2", device="cpu")
    with pytest.raises(ValueError, match="needs the dataset's columns 'vqa_list', but there is no 'vqa_list'"):
        reward(pictures(1), ["a cat"])


# A judge that runs here

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = [
    "<|video_pad|>",
    "<unk>",
    "user",
    "assistant",
    "How",
    "many",
    "pigs",
    "cats",
    "are",
    "Are",
    "green",
    "Yes",
    "yes",
]
WORDS += ["No", "one", "One", "1", "two", "Two", "2", "Three", "Answer", "word"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A tiny Qwen3-VL with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*SPECIAL[1:2], *SPECIAL[3:], WORDS[0]],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    Qwen2VLImageProcessorPil(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def test_a_judge_that_runs_here(judge):
    """Each question by itself, through `generate`, as the published evaluation asks it."""
    reward = load_reward("geneval2", model_name_or_path=judge, device="cpu", dtype="float32").load()
    images = pictures(2, 96, 64)
    scores = reward(images, ["two green pigs", "a cat"], vqa_list=[PIGS, CAT])
    model, tokenizer = reward.models["model"], reward.models["tokenizer"]
    expected = []
    for image, questions in zip(images, (PIGS, CAT), strict=True):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        pixels = reward.models["pixels"]([picture], return_tensors="pt")
        # 96 x 64 pixels are 3 x 2 squares of 32 x 32.
        assert pixels["image_grid_thw"].tolist() == [[1, 6, 4]]
        own = []
        for text, answer in questions:
            chat = f"<|im_start|>user <|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>{text} Answer in one word.<|im_end|>"
            tokens = tokenizer(f"{chat}<|im_start|>assistant ", return_tensors="pt")
            types = (tokens["input_ids"] == model.config.image_token_id).int()
            said = model.generate(
                **tokens,
                **pixels,
                mm_token_type_ids=types,
                max_new_tokens=1,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
            probabilities = said.scores[0].softmax(-1)[0]
            words = {"Yes": ("Yes", "yes"), "one": ("one", "One", "1"), "two": ("two", "Two", "2")}[answer]
            own.append(sum(probabilities[tokenizer.convert_tokens_to_ids(word)].item() for word in words))
        expected.append(own)
    assert reward.parts == [pytest.approx(own, abs=1e-5) for own in expected]
    assert scores == pytest.approx([math.prod(own) ** (1 / len(own)) for own in expected], abs=1e-5)
    assert len({round(value, 4) for own in expected for value in own}) == 5


def test_half_precision_by_default(judge):
    reward = load_reward("geneval2", model_name_or_path=judge, device="cpu").load()
    rotary = reward.models["model"].model.language_model.rotary_emb
    assert reward.models["model"].dtype == torch.bfloat16 and rotary.inv_freq.dtype == torch.float32
    assert 0 < reward(pictures(1, 64, 64), ["a cat"], vqa_list=[CAT])[0] < 1
