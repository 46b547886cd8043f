# SPDX-License-Identifier: Apache-2.0
"""The demo of a student as a Gradio Space: written to a folder, run on this machine, or deployed to the Hub."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..hub.locations import Source, parse_source
from ..utils.markdown import code, escape, hyperlink, table
from ..utils.serialization import dump_json, is_absolute
from .record import RECORD_FILE, RunRecord
from .space_content import SpaceContent, gather, lora_files, pin_lora


PYTHON_VERSION = "3.12"  # as ZeroGPU has it; the libraries need 3.11
GPU_HARDWARE = "a10g-small"
LIMITS = {"prompt": 500, "num_inference_steps": 50, "guidance_scale": 10.0, "strength": 1.5}
MAX_INCLUDED = 200 * 2**20
_BASE_SUFFIXES = (".json", ".txt", ".model", ".safetensors")


def write_space(
    folder: str | Path,
    student: str | Path,
    *,
    base: str | Path | None = None,
    title: str | None = None,
    teachers: dict[str, str | Path] | None = None,
    prompts: dict[str, list[str]] | None = None,
    include_weights: bool = False,
    token: str | None = None,
) -> Path:
    """
    Writes the demo of a student: `app.py`, `demo.json`, `requirements.txt` with the versions that are installed here,
    and `README.md`.

    Args:
        folder (`str` or `Path`):
            Where to.
        student (`str` or `Path`):
            Hub id `owner/name[/sub/folder][@revision]`, or the `output_dir` of a run. Its `run.json` tells the rest.
        base (`str` or `Path`, *optional*):
            Base pipeline: Hub id or local folder. By default that of `run.json`, or else that of the card.
        title (`str`, *optional*):
            Title of the demo. By default the name of the student.
        teachers (`dict[str, str | Path]`, *optional*):
            LoRA teacher of each task: Hub id or local path. By default those of `run.json` that are on the Hub.
        prompts (`dict[str, list[str]]`, *optional*):
            Example prompts of each task. By default those of the student's images.
        include_weights (`bool`, *optional*, defaults to `False`):
            Copies the models that are on this machine into the folder, up to 200 MB. Otherwise the demo names their
            paths, and runs on this machine only.
        token (`str`, *optional*):
            Token for the Hub instead of the one of `hf auth login` or `HF_TOKEN`. It is written nowhere.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: nothing says what the base is, or it is no pipeline of a known model family, or too large to copy.
        `SourceError`: something cannot be found or fetched.
        `ImportError`: a package of the demo is not installed here.
    """
    folder = Path(folder)
    content = gather(student, base, title, teachers, prompts, token)
    for path, data in _render(content, include_weights).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def run_space(student: str | Path, *, port: int | None = None, **kwargs: Any) -> None:
    """
    Runs the demo of a student on this machine until it is interrupted.

    Args:
        student (`str` or `Path`):
            As in [`write_space`], and so are `kwargs`.
        port (`int`, *optional*):
            Port to serve at. By default the first free one from 7860 on.

    Raises:
        As [`write_space`], and `OSError` if the port is taken.
    """
    with TemporaryDirectory(prefix="space_") as folder:
        write_space(folder, student, **kwargs)
        spec = importlib.util.spec_from_file_location("space_app", Path(folder) / "app.py")
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        app.page.launch(server_port=port, share=False, **app.LAUNCH)


def deploy_space(
    student: str | Path,
    repo_id: str,
    *,
    base: str | Path | None = None,
    title: str | None = None,
    teachers: dict[str, str | Path] | None = None,
    prompts: dict[str, list[str]] | None = None,
    private: bool | None = None,
    include_weights: bool = False,
    token: str | None = None,
) -> str:
    """
    Creates the Space of a student, or updates it, in one commit.

    Args:
        student (`str` or `Path`):
            As in [`write_space`], and so are `base`, `title`, `teachers`, `prompts` and `token`. For the folder of a run
            the Space shows what it was pushed to.
        repo_id (`str`):
            The Space: `owner/name`, or `name` in the account's own namespace.
        private (`bool`, *optional*):
            Whether a new Space is private.
        include_weights (`bool`, *optional*, defaults to `False`):
            Uploads the models that are on this machine into the Space itself, up to 200 MB.

    Returns:
        `str`: address of the Space.

    Raises:
        `ValueError`: a model is on this machine only, or as [`write_space`].
        `SourceError`, `ImportError`: as [`write_space`].
        `PushError`: the account cannot write there, or pushing failed.
    """
    from huggingface_hub import constants

    from ..hub.upload import check_push, create_repo, push_files

    repo_id = check_push(repo_id, token=token, repo_type="space")
    if not include_weights:
        student = _pushed(student)
    content = gather(student, base, title, teachers, prompts, token)
    local = [name for name, source in content.models.items() if source.path is not None]
    if include_weights and not local:
        raise ValueError("`include_weights`: all models are on the Hub, so there is nothing to include. Leave it out.")
    if local and not include_weights:
        raise ValueError(
            f"The Space could not load what is on this machine only: {', '.join(local)}. Push it to the Hub and pass "
            "its id, or upload small models into the Space itself with `include_weights`."
        )
    for task, teacher in content.teachers.items():
        if teacher.path is None:  # a Space that misses one does not start
            content.teachers[task], _ = pin_lora(teacher, f"teacher {task!r}", token)
    files = _render(content, include_weights)
    create_repo(repo_id, token=token, private=private, repo_type="space", space_sdk="gradio")
    push_files(files, repo_id, f"Demo of {content.title}", token=token, repo_type="space")
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def _pushed(student: str | Path) -> str | Path:
    """What the folder of a run was pushed to."""
    folder = parse_source(student, kind="student").path
    if folder is None:
        return student
    record = RunRecord.load(folder) if (folder / RECORD_FILE).is_file() else None
    if record is None or record.repo_id is None:
        raise ValueError(
            f"The student {str(student)!r} is on this machine and was not pushed to the Hub. Push it first "
            f"(`trl-diffusion-opd push {student} --repo_id owner/name`), or upload small models into the Space itself "
            "with `include_weights`."
        )
    return f"{record.repo_id}@{record.revision}" if record.revision else record.repo_id


def _render(content: SpaceContent, include_weights: bool) -> dict[str, bytes]:
    """The files of a Space by path."""
    template = _template_folder()
    places, files = {}, {}
    for folder, source in content.models.items():
        places[folder] = _place(source)
        if include_weights and source.path is not None:
            copied = _base_files(source.path) if folder == "base" else lora_files(source.path, folder)
            root = source.path if source.path.is_dir() else source.path.parent
            files |= {f"{folder}/{file.relative_to(root).as_posix()}": _read(file) for file in copied}
            places[folder]["id"] = folder
    size = sum(len(data) for data in files.values())
    if size > MAX_INCLUDED:
        raise ValueError(
            f"`include_weights`: the models have {size / 2**20:.0f} MB and {MAX_INCLUDED / 2**20:.0f} MB is the most "
            "that is put into a Space. Push them to the Hub and pass their ids."
        )
    limits = LIMITS | {name: max(LIMITS[name], content.defaults[name]) for name in LIMITS.keys() & content.defaults}
    limits["prompt"] = max([LIMITS["prompt"], *(len(text) for texts in content.prompts.values() for text in texts)])
    base, student, *teachers = places.values()
    demo = {
        "title": content.title,
        "description": content.description,
        "base": base,
        "student": student,
        "teachers": dict(zip(content.teachers, teachers, strict=True)),
        "prompts": content.prompts,
        "defaults": content.defaults,
        "guidance": content.guidance,
        "limits": limits,
        "dtype": content.dtype,
    }
    files |= {
        "app.py": (template / "app.py").read_bytes(),
        "demo.json": dump_json(demo, sort_keys=False, ensure_ascii=False).encode(),
        "requirements.txt": "".join(
            f"{name}=={_version(name)}\n" for name in (template / "requirements.txt").read_text().split()
        ).encode(),
        "README.md": _card(content).encode(),
    }
    return files


def _template_folder() -> Path:
    return Path(__file__).with_name("space_template")


def _place(source: Source) -> dict[str, str]:
    """How `demo.json` names a model."""
    if source.path is None:
        place = {"id": source.repo_id, "subfolder": source.subfolder, "revision": source.revision}
        return {name: value for name, value in place.items() if value is not None}
    path = source.path.resolve()
    return {"id": str(path)} if path.is_dir() else {"id": str(path.parent), "weight_name": path.name}


def _base_files(folder: Path) -> list[Path]:
    """The files of a pipeline, none of them a pickle."""
    return sorted(path for path in folder.rglob("*") if path.suffix in _BASE_SUFFIXES and path.is_file())


def _read(file: Path) -> bytes:
    """Reads a file of a model; a config without the paths that it was once loaded from."""
    if not file.name.endswith(("config.json", "model_index.json")):
        return file.read_bytes()
    content = json.loads(file.read_text(encoding="utf-8"))
    paths = [name for name, value in content.items() if is_absolute(value)]
    if not paths:
        return file.read_bytes()
    return dump_json({name: value for name, value in content.items() if name not in paths}, sort_keys=False).encode()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f'The demo needs {name!r}: pip install "trl-diffusion-opd[demo]".') from error


def _card(content: SpaceContent) -> str:
    from huggingface_hub import SpaceCard, SpaceCardData

    def link(source: Source) -> str:
        if source.path is not None:
            return code(source.path.resolve().name)
        page = f"https://huggingface.co/{source.repo_id}"
        commit = (
            f" at {hyperlink(f'`{source.revision[:7]}`', f'{page}/tree/{source.revision}')}" if source.revision else ""
        )
        return hyperlink(source.repo_id, page) + commit

    count = len(content.teachers)
    teachers = [[f"teacher of {escape(task)}", link(source)] for task, source in content.teachers.items()]
    hardware = None if content.dtype == "float32" else GPU_HARDWARE
    on_hub = [source.repo_id for source in content.models.values() if source.repo_id is not None]
    data = SpaceCardData(
        title=content.title,
        emoji="🎨",
        colorFrom="indigo",
        colorTo="pink",
        sdk="gradio",
        sdk_version=_version("gradio"),
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license="apache-2.0",
        models=list(dict.fromkeys(on_hub)) or None,
        tags=["text-to-image", "diffusers", "lora", "diffusion-opd"],
        short_description=f"One LoRA next to its base{f' and its {count} teachers' if count else ''}",
        suggested_hardware=hardware,
    )
    return str(
        SpaceCard.from_template(
            data,
            template_path=str(_template_folder() / "space_card.md"),
            title=escape(content.title),
            description=content.description,
            models=table(["", ""], [["base", link(content.base)], ["student", link(content.student)], *teachers]),
            teachers=bool(teachers),
            on_hub=bool(on_hub),
            hardware=hardware,
        )
    )
