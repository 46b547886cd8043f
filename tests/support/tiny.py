# SPDX-License-Identifier: Apache-2.0
"""Tiny but real SD3 components for the tests: every class is the one used in production, only the sizes are small."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)


# The attention projections that SD3 LoRAs usually target.
SD3_TARGETS = [
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
]

# Prompts made of these words only are never cut to `<unk>`.
WORDS = (
    "a an the of and on in at to with for over under above below beside left right two three four five six one "
    "photo image painting drawing sign poster shirt book cover mug text word saying that reads red green blue "
    "yellow black white orange purple pink brown small large bright dark old new happy sad circle square "
    "triangle star cat dog bird horse cow sheep bear car bus train boat plane bicycle chair table bench clock "
    "vase bottle cup bowl apple banana cake pizza tree flower house street city mountain river sea sky sun "
    "moon night day hello open welcome"
).split()


def tiny_transformer(seed: int = 0, num_layers: int = 2) -> SD3Transformer2DModel:
    """
    Builds an `SD3Transformer2DModel` of a few thousand parameters for 8 x 8 latents with 4 channels.

    Every weight is drawn anew: the default initialization makes the text so weak an input that a test could not tell
    two prompts apart.
    """
    with torch.random.fork_rng(devices=[]):
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=num_layers,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, 1.0 / math.sqrt(fan_in), generator=generator)
            elif not torch.all(parameter == 1):  # norm weights stay 1
                parameter.normal_(0.0, 0.1, generator=generator)
    return transformer.eval()


def tiny_inputs(batch_size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Returns the keyword arguments of one forward of [`tiny_transformer`]: 8 x 8 latents and 6 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch_size, 4, 8, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch_size, 6, 32, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch_size, 32, generator=generator).to(dtype),
        "timestep": torch.linspace(250.0, 750.0, batch_size).to(dtype),
    }


def velocity(transformer: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Runs one forward of `transformer` and returns the predicted velocity."""
    return transformer(**inputs, return_dict=False)[0]


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    start = ["<s>"] if kind == "clip" else []
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *start, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{'<s> ' if start else ''}$A </s>"
    specials = [(token, vocabulary[token]) for token in [*start, "</s>"]]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>" if start else None,
        model_max_length=16,
    )


def _clip(projection_dim: int, seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=projection_dim,
        intermediate_size=16,
        projection_dim=projection_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act="gelu",
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
        # The default gives embeddings of about 1e-2, which hides the prompt behind the layer norms' biases.
        initializer_range=0.5,
    )
    return CLIPTextModelWithProjection(config).eval()


def tiny_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """
    Builds a complete `StableDiffusion3Pipeline` (two CLIPs, T5, VAE, scheduler with shift 3) for 16 px images.

    It runs as `pipe("a red circle", num_inference_steps=2, height=16, width=16, max_sequence_length=16)` and can be
    saved and loaded. Like every builder here, it leaves the global random state as it was.
    """
    with torch.random.fork_rng(devices=[]):
        # SD3 joins the two CLIP outputs: 16 + 16 is the transformer's pooled dimension, and the joined hidden states
        # are padded to T5's width of 32.
        text_encoder, text_encoder_2 = _clip(16, seed + 1), _clip(16, seed + 2)
        torch.manual_seed(seed + 3)
        text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(WORDS) + 4,
                d_model=32,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                pad_token_id=0,
                eos_token_id=1,
                feed_forward_proj="gated-gelu",
            )
        ).eval()
        torch.manual_seed(seed + 4)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(4, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            sample_size=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ).eval()
    return StableDiffusion3Pipeline(
        transformer=tiny_transformer(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer("clip"),
        text_encoder_2=text_encoder_2,
        tokenizer_2=_tokenizer("clip"),
        text_encoder_3=text_encoder_3,
        tokenizer_3=_tokenizer("t5"),
    )


def random_lora(
    transformer_config_or_model=None,
    *,
    rank: int = 4,
    alpha: int = 8,
    targets: list[str] | None = None,
    seed: int = 0,
    scale: float = 0.1,
    **config_kwargs,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """
    Draws a LoRA whose every matrix is non-zero, for a tiny transformer: a model, its config, or `None`.

    `scale` is the standard deviation of the drawn values and `config_kwargs` (`use_rslora`, `rank_pattern`, ...) go to
    the `LoraConfig`. The state dict has the keys of `peft.get_peft_model_state_dict`.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or SD3_TARGETS, **config_kwargs)
    with torch.random.fork_rng(devices=[]):
        if transformer_config_or_model is None:
            transformer = tiny_transformer()
        else:
            transformer_config = getattr(transformer_config_or_model, "config", transformer_config_or_model)
            transformer = SD3Transformer2DModel.from_config(transformer_config)
        transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    state_dict = {
        # A DoRA magnitude is a norm: it must stay near 1 and positive.
        name: torch.randn(tensor.shape, generator=generator) * scale + ("magnitude" in name)
        for name, tensor in sorted(get_peft_model_state_dict(transformer).items())
    }
    return config, state_dict


def save_diffusers_lora(
    folder: str | Path, config: LoraConfig, state_dict: dict[str, torch.Tensor], metadata: bool = True
) -> Path:
    """Writes `pytorch_lora_weights.safetensors` as diffusers does, with or without the config in the header."""
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=state_dict,
        transformer_lora_adapter_metadata=config.to_dict() if metadata else None,
    )
    return Path(folder)


def save_peft_lora(folder: str | Path, config: LoraConfig, state_dict: dict[str, torch.Tensor]) -> Path:
    """Writes `adapter_model.safetensors` and `adapter_config.json` with PEFT itself."""
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny_transformer(), config)
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in state_dict.items()}
    assert not set_peft_model_state_dict(model, prefixed).unexpected_keys
    model.save_pretrained(folder)
    return Path(folder)
