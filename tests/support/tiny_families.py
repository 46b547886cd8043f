# SPDX-License-Identifier: Apache-2.0
"""Tiny but real pipelines of the model families beside Stable Diffusion 3: only the sizes are small."""

import math
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    ZImagePipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.support.tiny import WORDS, tiny_pipeline
from tests.support.tiny_transformers import BUILDERS


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<unk>"]
# Words of the templates, so that each is one token as with the real tokenizers.
TEMPLATE_WORDS = "system user assistant describe image by detailing color shape size texture quantity text spatial "
TEMPLATE_WORDS += "relationships of the objects and background"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = dict.fromkeys([*SPECIALS, "\n", ".", ",", ":", *TEMPLATE_WORDS.split(), *WORDS])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex("[.,:]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[0],
        unk_token="<unk>",
        eos_token=SPECIALS[2],
        additional_special_tokens=SPECIALS[1:5],
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def redrawn(model: nn.Module, seed: int) -> nn.Module:
    """Every matrix anew: the default initialization hides prompt and time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter[0].numel()), generator=generator)
            elif not torch.all(parameter == 1):  # norm weights stay 1
                parameter.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def _vae(kind: type = AutoencoderKL, **options) -> nn.Module:
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def _qwen3(kind: type, layers: int) -> nn.Module:
    config = Qwen3Config(
        vocab_size=len(_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=layers,
    )
    return redrawn(kind(config), 3)


def _t5() -> nn.Module:
    return redrawn(
        T5EncoderModel(T5Config(vocab_size=len(_tokenizer()), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        4,
    )


def _clip() -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=2,
    )
    return redrawn(CLIPTextModel(config), 5)


def _zimage(shift: float = 6.0) -> ZImagePipeline:
    return ZImagePipeline(
        transformer=redrawn(BUILDERS["ZImagePipeline"](), 0),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_qwen3(Qwen3Model, 2),
        tokenizer=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )


def _flux2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    vae = _vae(AutoencoderKLFlux2)
    with torch.no_grad():
        vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return Flux2KleinPipeline(
        transformer=redrawn(BUILDERS["Flux2KleinPipeline"](), 0),
        vae=vae,
        text_encoder=_qwen3(Qwen3ForCausalLM, 28),
        tokenizer=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        is_distilled=is_distilled,
    )


def _flux(guidance_embeds: bool = True) -> FluxPipeline:
    transformer = BUILDERS["FluxPipeline"]()
    if not guidance_embeds:
        transformer = type(transformer).from_config({**transformer.config, "guidance_embeds": False})
    clip_tokenizer = _tokenizer()
    clip_tokenizer.model_max_length = 16
    return FluxPipeline(
        transformer=redrawn(transformer, 0),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer,
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**(DYNAMIC if guidance_embeds else {"shift": 1.0})),
    )


def _qwen_image() -> QwenImagePipeline:
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    ids = {"image_token_id": 0, "video_token_id": 0, "vision_start_token_id": 0, "vision_end_token_id": 0}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(_tokenizer()),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        **ids,
    )
    return QwenImagePipeline(
        transformer=redrawn(BUILDERS["QwenImagePipeline"](), 0),
        vae=redrawn(vae, 1),
        text_encoder=redrawn(Qwen2_5_VLForConditionalGeneration(config), 2),
        tokenizer=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**DYNAMIC, "max_shift": 0.9, "shift_terminal": 0.02}),
    )


FAMILY_PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd3": tiny_pipeline,
    "zimage": _zimage,
    "flux2_klein": _flux2_klein,
    "flux": _flux,
    "qwen_image": _qwen_image,
}


def family_pipeline(name: str, **options) -> DiffusionPipeline:
    """A complete pipeline of a family for images of 16 px, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = FAMILY_PIPELINES[name](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
