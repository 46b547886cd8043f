# SPDX-License-Identifier: Apache-2.0
"""
Train a LoRA teacher for every task, by fine-tuning the base on right captions and the task's own style only, and
write its model card.

    python examples/shapes/train_teachers.py

Nothing holds a teacher to the base on the other tasks: it forgets or redraws them, as narrow fine-tunes do.
"""

import argparse
import copy
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import trange

from trl_diffusion_opd.card import render_card
from trl_diffusion_opd.figures import enlarge, image_grid, to_pil
from trl_diffusion_opd.licenses import read_license
from trl_diffusion_opd.record import GalleryImage, PromptSet, RunRecord
from trl_diffusion_opd.recording import device_name, library_versions, lora_settings
from trl_diffusion_opd.sources import Origin


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.model import MAX_TOKENS, load_pipeline  # noqa: E402
from shapes.render import Recipe, make_dataset  # noqa: E402
from shapes.rewards import REWARDS  # noqa: E402
from shapes.sampling import SCORE_SEED, PromptEmbeddings, draw, encode, format_scores, score  # noqa: E402
from shapes.training import diffuse, to_images  # noqa: E402
from shapes.world import SIZE, TASKS, Split, Task, prompts, sample_prompts  # noqa: E402


# Attention and feed-forward of both streams, text and picture.
TARGET_MODULES = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]

SKILLS = {
    "geneval": "draws coloured shapes in the number and the places asked for, on a plain ground",
    "ocr": "writes the two letters asked for, dark on light",
    "aesthetic": "draws landscapes as colourful posters",
}
Scores = dict[str, tuple[float, float]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="examples/shapes/base")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/shapes/teachers"))
    parser.add_argument("--cards_dir", type=Path, default=Path("model_cards"), help="folder of the model cards")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters; their alpha is twice as large")
    parser.add_argument("--steps", type=int, default=400, help="training steps of every teacher")
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--num_pictures", type=int, default=8000)
    parser.add_argument("--num_eval", type=int, default=200, help="pictures a task to score a teacher with")
    return parser.parse_args()


def train(pipe: StableDiffusion3Pipeline, task: Task, args: argparse.Namespace) -> None:
    """Fit the pipeline's active adapter to right pictures of one task."""
    pictures, captions = make_dataset(args.num_pictures, Recipe(tasks={task: 1.0}), args.seed + 1)
    latents, embeddings = encode(pipe, to_images(pictures)), PromptEmbeddings(pipe)
    rows = embeddings.rows(captions)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 20, max(0.02, 2 - 2 * step / args.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    progress = trange(args.steps, desc=f"teacher {task}", mininterval=5)
    for _ in progress:
        picked = torch.randint(len(latents), (args.batch_size,))
        noisy, target, timesteps = diffuse(latents[picked])
        text = rows[picked]
        velocity = pipe.transformer(
            noisy, embeddings.tokens[text], embeddings.pooled[text], timesteps, return_dict=False
        )[0]
        loss = (velocity - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def save(pipe: StableDiffusion3Pipeline, directory: Path, task: Task) -> None:
    """Save the adapter in half precision, with its configuration, in the format of diffusers."""
    state = get_peft_model_state_dict(pipe.transformer, adapter_name=task)
    StableDiffusion3Pipeline.save_lora_weights(
        directory,
        transformer_lora_layers={name: tensor.to(torch.float16) for name, tensor in state.items()},
        transformer_lora_adapter_metadata=pipe.transformer.peft_config[task].to_dict(),
    )


def prompt_set(task: Task, split: Split) -> PromptSet:
    return PromptSet(
        task,
        Origin.local(Path(__file__).parent / "prompts" / f"{task}_{split}.txt", "dataset"),
        num_prompts=len(prompts(task, split)),
        examples=[str(prompt) for prompt in sample_prompts(task, split, 2, seed=0)],
    )


def write_card(
    folder: Path,
    task: Task,
    args: argparse.Namespace,
    seconds: float,
    base: StableDiffusion3Pipeline,
    teacher: StableDiffusion3Pipeline,
    results: dict[str, Scores],
) -> None:
    """Write record, pictures and model card of a teacher."""
    embeddings = PromptEmbeddings(base)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    texts = [text for other in TASKS for text in sample_prompts(other, "test", 2 if other == task else 1, args.seed)]
    pictures = {
        name: [draw(pipe, embeddings, [text], seed)[0] for seed, text in enumerate(texts, args.seed)]
        for name, pipe in (("base", base), (f"teacher {task}", teacher))
    }
    image_grid(pictures, texts).save(folder / "images" / "grid.png")
    gallery = []
    for seed, (text, picture) in enumerate(zip(texts, pictures[f"teacher {task}"], strict=True), args.seed):
        if text in prompts(task, "test"):
            file = f"images/{task}_{len(gallery)}.png"
            enlarge(to_pil(picture)).save(folder / file)
            gallery.append(GalleryImage(text, file, task, seed, args.steps))
    settings = {name: getattr(args, name) for name in ("seed", "steps", "batch_size", "learning_rate", "num_pictures")}
    record = RunRecord(
        name=f"shapes-teacher-{task}",
        summary=(
            f"A LoRA that {SKILLS[task]}, in the little world of the Shapes. It is a teacher for distillation, fine-tuned "
            f"on {args.num_pictures:,} rendered pictures of this one task with right captions; nothing held it to what "
            "the base draws for the other tasks."
        ),
        base=Origin.local(args.base),
        base_license=read_license(Origin.local(args.base), args.base),
        prompts=[prompt_set(task, "train")],
        eval_prompts=[
            replace(
                prompt_set(other, "test"),
                num_prompts=len(set(sample_prompts(other, "test", args.num_eval, SCORE_SEED))),
                num_images=args.num_eval,
                num_seen=0,
            )
            for other in TASKS
        ],
        inference={
            "height": SIZE,
            "width": SIZE,
            "num_inference_steps": 10,
            "guidance_scale": 1.0,
            "max_sequence_length": MAX_TOKENS,
        },
        dtype="float32",
        settings={**settings, **lora_settings(teacher.transformer.peft_config[task])},
        rounds=args.steps,
        planned_rounds=args.steps,
        images_per_round=args.batch_size,
        seconds=seconds,
        hardware={"device": device_name(torch.device("cpu")), "num_processes": 1},
        gallery=gallery,
        results={name: {other: mean for other, (mean, _) in scores.items()} for name, scores in results.items()},
        reward_names={other: [other] for other in TASKS},
        reward_docs={other: REWARDS[other].__doc__ for other in TASKS},
        grid="images/grid.png",
        versions=library_versions(("trl-diffusion-opd", "diffusers", "transformers", "peft", "torch")),
        date=date.today().isoformat(),
    )
    record.save(folder)
    render_card(record).save(folder / "README.md")


def main() -> None:
    args = parse_args()
    base = load_pipeline(args.base)
    base_scores = score(base, PromptEmbeddings(base), args.num_eval)
    for task in args.tasks:
        start = time.time()
        torch.manual_seed(args.seed)
        pipe = StableDiffusion3Pipeline(**{**base.components, "transformer": copy.deepcopy(base.transformer)})
        config = LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, init_lora_weights="gaussian", target_modules=TARGET_MODULES
        )
        pipe.transformer.add_adapter(config, adapter_name=task)
        train(pipe, task, args)
        save(pipe, args.output_dir / task, task)
        seconds = time.time() - start
        pipe.transformer.delete_adapters(task)
        pipe.load_lora_weights(args.output_dir / task, adapter_name=task)
        scores = score(pipe, PromptEmbeddings(pipe), args.num_eval)
        print(f"teacher {task}, {seconds:.0f} s:", format_scores(scores))
        results = {"base": base_scores, "student": scores}
        write_card(args.cards_dir / f"shapes_teacher_{task}", task, args, seconds, base, pipe, results)


if __name__ == "__main__":
    main()
