# SPDX-License-Identifier: Apache-2.0
"""
The untrained pipeline of the Shapes world: a genuine `StableDiffusion3Pipeline` with every part at toy size.

The three text encoders keep their random weights: they only have to tell prompts apart, which `CLIPTextModel`s do once
their token embeddings have unit scale (at the default scale their outputs hardly depend on the prompt).
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .world import SIZE, vocabulary


MAX_TOKENS = 10  # the longest prompts have eight words; every tokenizer adds a first and a last token
TEXT_WIDTH = 64  # of the T5 encoder; each CLIP encoder has half of it
LATENT_CHANNELS = 4
LATENT_SIZE = SIZE // 2
PATCH_SIZE = 2
SHIFT = 3.0  # of the noise schedule, as in Stable Diffusion 3

SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
PAD, _, BOS, EOS = range(len(SPECIAL_TOKENS))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; quoted letters and quotation marks are tokens of their own."""
    tokens = [*SPECIAL_TOKENS.values(), *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex('[A-Z"]'), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **SPECIAL_TOKENS)


def build_clip(vocab_size: int, seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    width = TEXT_WIDTH // 2
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    encoder = CLIPTextModelWithProjection(config)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=1.0 if module.num_embeddings == vocab_size else 0.5)
    torch.nn.init.orthogonal_(encoder.text_projection.weight)
    return encoder


def build_t5(vocab_size: int, seed: int) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return T5EncoderModel(config)


def build_vae() -> AutoencoderKL:
    channels = (16, 32)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer(num_layers: int = 4, num_heads: int = 3, head_width: int = 32) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=PATCH_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=num_layers,
        num_attention_heads=num_heads,
        attention_head_dim=head_width,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=num_heads * head_width,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // PATCH_SIZE,
        qk_norm="rms_norm",
    )


def build_pipeline(seed: int = 0, num_layers: int = 4, num_heads: int = 3) -> StableDiffusion3Pipeline:
    """The whole pipeline with random weights. Of whatever size it is, all but the transformer are the same."""
    tokenizer = build_tokenizer()
    clip, clip_2 = build_clip(len(tokenizer), seed + 1), build_clip(len(tokenizer), seed + 2)
    t5 = build_t5(len(tokenizer), seed + 3)
    torch.manual_seed(seed)
    pipe = StableDiffusion3Pipeline(
        transformer=build_transformer(num_layers, num_heads),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=build_vae(),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=clip_2,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer,
    )
    return freeze(pipe)


def load_pipeline(path: str) -> StableDiffusion3Pipeline:
    """A saved pipeline in float32, every part frozen and in evaluation mode."""
    return freeze(StableDiffusion3Pipeline.from_pretrained(path, dtype=torch.float32))


def freeze(pipe: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
