# SPDX-License-Identifier: Apache-2.0
"""UnifiedReward: the number in an answer, a server that behaves and one that does not, and a tiny model that runs here."""

import base64
import io
import math
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.chat_server import LoopbackChat as Server
from trl_diffusion_opd.rewards import load_reward
from trl_diffusion_opd.rewards.chat_server import ChatServer, ChatServerError
from trl_diffusion_opd.rewards.unifiedreward import INSTRUCTION, parse_score


@pytest.mark.parametrize(
    "answer, score",
    [
        ("cat (object): 1\nred (attribute): 0\nFinal Score: 3", 3.0),
        ("Final Score: 4.75", 4.75),
        ("**Final Score:** 4", 4.0),
        ("**Final Score: 2.5**", 2.5),
        ("final score: [5]", 5.0),
        ("Final Score:3/5", 3.0),
        ("I would say Final Score: 2, no: Final Score: 4", 4.0),
        ("Final Score: 10", None),  # the reference reads a 1
        ("Final Score: 5.9", None),
        ("Final Score: 0", None),
        ("Final Score: -3", None),
        ("Final Score: high", None),
        ("The score is 4", None),
        ("", None),
    ],
)
def test_score_in_an_answer(answer, score):
    assert parse_score(answer) == score


def reward_of(server, **options):
    return load_reward("unifiedreward", model_name_or_path="judge", base_url=server.url, device="cpu", **options)


def caption(body):
    text = body["messages"][0]["content"][1]["text"]
    return text[text.rindex("[") + 1 : -1]


def pictures(number):
    return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_server_is_asked_about_image_and_caption():
    with Server(lambda number, body: f"Final Score: {len(caption(body))}") as server:
        images = pictures(3)
        reward = reward_of(server, max_new_tokens=99)
        scores = reward(images, ["a", "abc", "a {cat"[:4]])
    assert scores == pytest.approx([1 / 5, 3 / 5, 4 / 5]) and reward.table_factor == 5.0
    assert (reward.num_scored, reward.num_failed) == (3, 0)
    path, body = next(request for request in server.requests if caption(request[1]) == "abc")
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 99)
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": INSTRUCTION.replace("{prompt}", "abc")}
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    own = Image.fromarray((images[1] * 255).round().byte().permute(1, 2, 0).numpy())
    assert sent.size == (512, 512) and np.array_equal(np.asarray(sent), np.asarray(own.resize((512, 512))))
    assert not any("Authorization" in headers for headers in server.headers)


def test_key_comes_from_the_environment_only(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with Server(lambda number, body: "Final Score: 5") as server:
        reward = reward_of(server, api_key_env="JUDGE_KEY")
        assert reward(pictures(1), ["a"]) == [1.0]
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer sesame"] * 2
    assert "sesame" not in repr(vars(reward)) + repr(vars(reward.server))
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="'JUDGE_KEY', which is not set"):
        reward_of(server, api_key_env="JUDGE_KEY")


def test_the_token_of_the_hub_is_for_nobody_else(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with Server(lambda number, body: "Final Score: 5") as server:
        assert reward_of(server)(pictures(1), ["a"]) == [1.0]
    assert len(server.headers) == 2 and "hf_mine" not in str(server.headers) and "hf_mine" not in str(server.requests)


def test_garbage_is_failed_and_the_rest_is_scored(caplog):
    answers = {
        "good": "Final Score: 2",
        "bad": "lovely!",
        "none": b'{"choices": []}',
        "html": b"<html>",
        "refused": 400,
    }
    with Server(lambda number, body: answers[caption(body)]) as server:
        reward = reward_of(server, max_retries=0)
        scores = reward(pictures(6), ["bad", "good", "none", "html", "refused", "good"])
    assert [math.isnan(score) for score in scores] == [True, False, True, True, True, False]
    assert scores[1] == scores[5] == pytest.approx(0.4)
    assert (reward.num_scored, reward.num_failed) == (2, 4)
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2 and any("'lovely!'" in message for message in logged)  # each reason once


def test_a_broken_server_is_asked_again():
    waits = []

    def patient(server, **options):
        reward = reward_of(server, **options)
        reward.server.sleep = waits.append
        return reward

    with Server(lambda number, body: 500 if number < 3 else "Final Score: 3") as server:
        assert patient(server, max_retries=3)(pictures(1), ["a"]) == pytest.approx([0.6])
        assert len(server.requests) == 4 and waits == [0.25, 0.5, 1.0]
    with Server(lambda number, body: 503) as server:
        reward = patient(server, max_retries=1)
        assert math.isnan(reward(pictures(1), ["a"])[0])
        assert len(server.requests) == 2 and reward.num_failed == 1 and waits[3:] == [0.25]
    with Server(lambda number, body: 400) as server:
        assert math.isnan(patient(server)(pictures(1), ["a"])[0])
        assert len(server.requests) == 1 and len(waits) == 4  # it would say the same again


def test_a_slow_server_is_not_waited_for():
    def answer(number, body):
        if caption(body) == "slow":
            time.sleep(1.5)
        return "Final Score: 4"

    with Server(answer) as server:
        reward = reward_of(server, timeout=0.4, max_retries=0)
        start = time.perf_counter()
        scores = reward(pictures(2), ["slow", "fast"])
        assert time.perf_counter() - start < 1.4
    assert math.isnan(scores[0]) and scores[1] == pytest.approx(0.8)


def test_requests_are_sent_at_once_and_answers_keep_their_order():
    together = threading.Barrier(4, timeout=20)

    def answer(number, body):
        together.wait()  # goes on when four requests are here
        time.sleep(0.02 * (4 - int(caption(body))))
        return f"Final Score: {int(caption(body)) + 1}"

    with Server(answer) as server:
        scores = reward_of(server, batch_size=4)(pictures(8), list("01230123"))
    assert scores == pytest.approx([0.2, 0.4, 0.6, 0.8] * 2)


@pytest.mark.parametrize("status", [401, 404, 302, 307])
def test_a_server_that_refuses_everybody_stops_the_run(status):
    with Server(lambda number, body: status) as server:
        with pytest.raises(ChatServerError, match=f"answered {status}.*Check the address, the model and the key"):
            reward_of(server)(pictures(1), ["a"])
        assert [path for path, _ in server.requests] == ["/v1/chat/completions"]
        assert len(server.headers) == 2  # the list of models and this: no redirect is followed


def test_server_is_checked_before_the_first_score():
    with Server(lambda number, body: "Final Score: 1", served=("other", "another")) as server:
        with pytest.raises(ChatServerError, match=r"no model 'judge'. It has \['other', 'another'\]"):
            reward_of(server).load()
    with pytest.raises(ChatServerError, match="did not answer.*Is a server running"):
        reward_of(server, max_retries=0).load()
    with Server(lambda number, body: "Final Score: 1", served=None) as server:
        assert reward_of(server)(pictures(1), ["a"]) == [0.2]  # it lists no models
    with pytest.raises(ValueError, match="must start with `http://`"):
        ChatServer("localhost:8000/v1", "judge")
    with pytest.raises(ValueError, match="no `{prompt}`"):
        load_reward("unifiedreward", instruction="How good is it?")


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
ANSWERS = ["<|video_pad|>", "Final Score: 4", "Final Score: 2"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A tiny Qwen2.5-VL with random weights, whose vocabulary holds two whole answers."""
    folder = tmp_path_factory.mktemp("judge")
    words = ["<unk>", "user", "assistant", "cat", "dog", "red", "Caption", "Quality", "[", "]", ":", "1", "5"]
    vocabulary = {word: i for i, word in enumerate(SPECIAL + ANSWERS + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*SPECIAL[1:2], *SPECIAL[3:], ANSWERS[0]],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}).save_pretrained(folder)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
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
            "fullatt_block_indexes": [1],
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", None], ids=["float32", "default"])
def test_a_model_that_runs_here(judge, dtype):
    reward = load_reward(
        "unifiedreward", model_name_or_path=judge, device="cpu", dtype=dtype, max_new_tokens=1, batch_size=4
    ).load()
    model = reward.models["model"]
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), pictures(1)[0]])
    captions = ["a red cat", "a dog", "a red dog and a red cat"]

    # What the model makes of each image, one at a time; its answers so far are noise.
    seen = []
    positions = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1].clone()))
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"][-3:, 0]), with_kwargs=True
    )
    before = [reward(images[i : i + 1], captions[i : i + 1])[0] for i in range(3)]
    hook.remove()
    assert all(map(math.isnan, before)) and reward.num_failed == 3
    black, white, noise = seen
    assert (black - white).norm() > 1e-2

    # 112 x 112 pixels are 4 x 4 tokens after three others, each with its time, row and column.
    grid = positions[0][:, 3:19] - positions[0][:, 3:4]
    assert grid[1].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 and grid[2].tolist() == [0, 1, 2, 3] * 4
    assert not grid[0].any()

    # A head that answers 4 for the black image and 2 for the white one.
    answers = {text: reward.models["tokenizer"].convert_tokens_to_ids(text) for text in ANSWERS}
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[answers["Final Score: 4"]] = black / black.norm() - white / white.norm()
        model.lm_head.weight[answers["Final Score: 2"]] = white / white.norm() - black / black.norm()
    expected = 0.8 if noise @ (black / black.norm() - white / white.norm()) > 0 else 0.4
    # Captions of different lengths in one batch: padding is on the left.
    assert reward(images, captions) == pytest.approx([0.8, 0.4, expected])
    assert reward(images.flip(0), captions[::-1]) == pytest.approx([expected, 0.4, 0.8])


def test_half_precision_keeps_the_rotary_frequencies(judge):
    reward = load_reward("unifiedreward", model_name_or_path=judge, device="cpu").load()
    rotary = reward.models["model"].model.language_model.rotary_emb
    assert reward.models["model"].dtype == torch.bfloat16 and rotary.inv_freq.dtype == torch.float32
    assert rotary.inv_freq.tolist() == pytest.approx([10000 ** (-i / 8) for i in range(8)])
    reward.to(dtype="float32").load()
    assert reward.models["model"].dtype == torch.float32
    reward.free()
    assert reward.models == {}
