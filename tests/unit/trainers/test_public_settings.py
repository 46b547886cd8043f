# SPDX-License-Identifier: Apache-2.0
"""What leaves the machine is an allow-list: no file of a run, no logger and no message has a credential in it."""

import json
import re

import pytest
import torch

from tests.support.runs import PROMPTS, make_teachers, make_trainer, small_lora
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.hub.options import INIT_KWARGS, check_init_kwargs
from trl_diffusion_opd.models.registry import DEFAULT_PIPELINE, family_named
from trl_diffusion_opd.models.sd3_sde_pipeline import StableDiffusion3SDEPipeline
from trl_diffusion_opd.publishing.push import read_run
from trl_diffusion_opd.trainers.run_record import changed_settings, lora_settings
from trl_diffusion_opd.utils.serialization import public_settings


SD3_DEFAULTS = family_named(DEFAULT_PIPELINE).defaults(dict)
SECRET = "s3cr3t-do-not-tell"
# Settings that take free text or a mapping, each with a credential.
PLANTED = {
    "model_init_kwargs": {
        "token": f"hf_{SECRET}",
        "cache_dir": f"/home/me/{SECRET}",
        "quantization_config": {"nested": [{"deep": SECRET}]},
        "custom_revision": SECRET,
        "variant": None,
    },
    "hub_token": f"hf_{SECRET}",
    "run_name": SECRET,
    "optim_args": f"password={SECRET}",
    "trackio_space_id": f"me/{SECRET}",
    "trackio_bucket_id": f"me/{SECRET}",
}


def test_no_file_and_no_message_of_a_run_has_a_credential(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "out" / "tensorboard"))
    tiny_pipeline().save_pretrained(tmp_path / "base")
    make_teachers(tmp_path)
    (tmp_path / "count.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS["count"]))
    data = {"path": str(tmp_path / "count.jsonl"), "token": SECRET}
    kwargs = {name: value for name, value in PLANTED["model_init_kwargs"].items() if name != "quantization_config"}
    trainer = make_trainer(
        tmp_path,
        pipeline=str(tmp_path / "base"),
        data={**PROMPTS, "count": data},
        peft_config=small_lora(base_model_name_or_path=f"/home/me/{SECRET}"),
        optimizers=(lambda parameters: torch.optim.SGD(parameters, lr=0.1), None),  # or it would read `optim_args`
        **{
            **PLANTED,
            "model_init_kwargs": kwargs,
            "report_to": ["tensorboard"],
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": 2,
        },
    )
    # What would not be loaded with: there where it is written and sent.
    trainer.args.model_init_kwargs = PLANTED["model_init_kwargs"] | {
        "proxies": {"https": f"http://user:{SECRET}@proxy:1"},
        "headers": {"Authorization": SECRET},
        "api_key": SECRET,
    }
    trainer.args.lr_scheduler_kwargs = {"min_lr_ratio": 0.5, "words": SECRET, "deep": {"er": SECRET}}
    trainer.args.fsdp_config = {"key": SECRET}
    trainer.train()
    trainer.save_model()

    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name.partition(".")[0] for path in files}
    assert names >= {"README", "run", "training_args", "provenance", "events", "pytorch_lora_weights", "optimizer"}
    assert [path.name for path in files if SECRET.encode() in path.read_bytes()] == []
    assert [name for name, content in read_run(tmp_path / "out").items() if SECRET.encode() in content] == []
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + caplog.text
    # It was looked at: what is harmless is there.
    saved = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert saved["lr_scheduler_kwargs"] == {"min_lr_ratio": 0.5} and saved["solver"] == "flow"
    assert saved["hub_token"] == "<HUB_TOKEN>" and saved["run_name"] == "<RUN_NAME>"
    assert saved["output_dir"] == "out" and saved["model_init_kwargs"] == {"variant": None}
    assert any(b"min_lr_ratio" in path.read_bytes() for path in files if path.name.startswith("events"))


def test_settings_of_a_subclass_are_not_shown(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Own(DiffusionOPDConfig):
        api_key: str | None = None
        weights: dict | None = None
        words: list | None = None
        temperature: float = 1.0

    config = Own(str(tmp_path), use_cpu=True, api_key=SECRET, weights={"a": SECRET}, words=[1, SECRET], temperature=2)
    settings = config.to_dict()
    assert (settings["api_key"], settings["weights"], settings["words"]) == ("<API_KEY>", "<WEIGHTS>", "<WORDS>")
    assert changed_settings(config, SD3_DEFAULTS) == {"temperature": 2}


def test_settings_that_may_be_shown():
    settings = {
        "seed": 7,
        "bf16": True,
        "max_steps": None,
        "learning_rate": 1e-4,
        "solver": "cps",
        "reward_weights": [1.0, 2.0],
        "report_to": ["tensorboard", "/home/me/x"],
        "output_dir": "/home/me/runs/first",
        "task_weights": {"ocr": 2},
        "lr_scheduler_kwargs": {"num_decay_steps": 5, "name": SECRET, "more": {"number": 1}},
        "model_init_kwargs": {
            "revision": "v1",
            "variant": "fp16",
            "dtype": "/home/me",
            "token": SECRET,
            "proxies": {},
        },
        "unknown_number": 3,
        "unknown_text": SECRET,
        "unknown_mapping": {"number": 1},
    }
    assert public_settings(settings) == {
        "seed": 7,
        "bf16": True,
        "max_steps": None,
        "learning_rate": 1e-4,
        "solver": "cps",
        "reward_weights": [1.0, 2.0],
        "report_to": ["tensorboard", "x"],
        "output_dir": "first",
        "task_weights": {"ocr": 2},
        "lr_scheduler_kwargs": {"num_decay_steps": 5},
        "model_init_kwargs": {"revision": "v1", "variant": "fp16"},
        "unknown_number": 3,
    }
    assert public_settings(public_settings(settings)) == public_settings(settings)


def test_the_place_of_a_lora_is_no_setting():
    assert lora_settings(small_lora(base_model_name_or_path="/home/me/base")) == lora_settings(small_lora())


@pytest.mark.parametrize("name", ["api_key", "headers", "proxies"])
def test_unknown_options_of_from_pretrained_are_refused_without_their_values(tmp_path, capfd, name):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    message = f"model: `model_init_kwargs` has '{name}', which `from_pretrained` does not take. Leave it out"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make_trainer(tmp_path, pipeline=str(tmp_path / "base"), model_init_kwargs={name: SECRET, "revision": None})
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + str(caught.value)


def test_options_that_diffusers_takes_are_passed_on(tmp_path, capfd):
    """Fails when diffusers stops taking one of them: it would say so, with its value."""
    components = tiny_pipeline()
    components.save_pretrained(tmp_path)
    check_init_kwargs([*INIT_KWARGS, "vae", "image_encoder"], StableDiffusion3SDEPipeline)
    values = dict.fromkeys(INIT_KWARGS - {"low_cpu_mem_usage", "torch_dtype"}) | {"vae": components.vae}
    values |= {"use_flashpack": False, "disable_mmap": False, "trust_remote_code": False, "force_download": False}
    loaded = StableDiffusion3SDEPipeline.from_pretrained(tmp_path, **values)
    said = capfd.readouterr()
    assert loaded.vae is components.vae and "not expected" not in said.out + said.err


def test_a_dtype_that_torch_lacks(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="`dtype` in `model_init_kwargs` must be a dtype of torch, .* but is 'fp61'"):
        make_trainer(tmp_path, pipeline=str(tmp_path / "base"), model_init_kwargs={"dtype": "fp61"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "nope"}, "nope is not supported, only .*tensorboard"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "`eval_strategy` is 'steps', but there is no `eval_dataset`"),
    ],
)
def test_what_the_base_class_needs_is_checked_before_the_base_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, pipeline="nowhere/at-all", **settings)
