# SPDX-License-Identifier: Apache-2.0
"""
The checks of `/api/validate-yaml`: rules of the Hub for the front matter of a README.md, as far as they are known.

One is stricter than the real Hub, whose documentation only asks for it: `license: other` needs a `license_name`.
"""

import re

import yaml


LICENSES = set(
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research "
    "intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit "
    "mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown "
    "unlicense wtfpl zlib".split()
)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
REPO_ID = r"(?:[\w.-]+/)?[\w.-]{1,96}"


def front_matter(text: str) -> str | None:
    """Returns the YAML between the first two `---` lines, or `None`."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    return match and match[1]


def validate_card(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Returns the errors and the warnings for a README.md."""
    block = front_matter(text)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {' '.join(str(error).split())}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["The metadata must be a mapping"], []
    errors = _check_common(data)
    if repo_type == "model":
        errors += _check_model(data)
    if repo_type == "space":
        errors += _check_space(data)
    return errors, []


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _check_common(data: dict) -> list[str]:
    errors = []
    for name in ("tags", "datasets", "language", "metrics", "models"):
        values = _listed(data.get(name) or [])
        if name == "tags" and "tags" in data and not isinstance(data["tags"], list):
            errors.append('"tags" must be an array')
        errors += [f'"{name}[{i}]" must be a string' for i, value in enumerate(values) if not isinstance(value, str)]
        if name in ("datasets", "models"):
            kind = name.removesuffix("s")
            errors += [
                f'"{name}[{i}]" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{name}.'
                for i, value in enumerate(values)
                if isinstance(value, str) and not re.fullmatch(REPO_ID, value)
            ]
    for name in ("license_name", "license_link", "title", "pipeline_tag", "library_name", "thumbnail"):
        if data.get(name) is not None and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    if "license" in data:
        unknown = [value for value in _listed(data["license"]) if value not in LICENSES]
        if unknown:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}], but is {unknown[0]!r}')
        if data["license"] == "other" and not data.get("license_name"):
            errors.append('"license_name" is required where "license" is "other"')
    return errors


def _check_model(data: dict) -> list[str]:
    errors = []
    for value in _listed(data.get("base_model") or []):
        if not isinstance(value, str) or not re.fullmatch(REPO_ID, value):
            errors.append(f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", "adapter") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    widget = data.get("widget") or []
    if not isinstance(widget, list):
        errors.append('"widget" must be an array')
        widget = []
    for i, example in enumerate(widget):
        if not isinstance(example, dict) or not isinstance(example.get("text"), str):
            errors.append(f'"widget[{i}].text" must be a string')
        elif "output" in example and not (
            isinstance(example["output"], dict) and isinstance(example["output"].get("url"), str)
        ):
            errors.append(f'"widget[{i}].output.url" must be a string')
    return errors + _check_model_index(data.get("model-index", []))


def _check_model_index(index) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("results"), list):
            errors.append(f'"{where}.results" must be an array')
            continue
        if not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" must be a string')
        for j, result in enumerate(model["results"]):
            where = f"model-index[{i}].results[{j}]"
            result = result if isinstance(result, dict) else {}
            needed = [("task", result.get("task"), ("type",)), ("dataset", result.get("dataset"), ("type", "name"))]
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{where}.metrics" must be an array of at least one metric')
                metrics = []
            needed += [(f"metrics[{k}]", metric, ("type", "value")) for k, metric in enumerate(metrics)]
            for name, value, keys in needed:
                value = value if isinstance(value, dict) else {}
                errors += [f'"{where}.{name}.{key}" is required' for key in keys if value.get(key) is None]
    return errors


def _check_space(data: dict) -> list[str]:
    errors = []
    if data.get("sdk") not in ("gradio", "docker", "static", "streamlit"):
        errors.append('"sdk" must be one of [gradio, docker, static, streamlit]')
    if "sdk_version" in data and not re.fullmatch(r"\d+(\.\d+){1,2}([-.a-z0-9]+)?", str(data["sdk_version"])):
        errors.append('"sdk_version" must be a version')
    if "python_version" in data and not re.fullmatch(r"3(\.\d+){1,2}", str(data["python_version"])):
        errors.append('"python_version" must be a Python 3 version')
    for name in ("colorFrom", "colorTo"):
        if name in data and data[name] not in COLORS:
            errors.append(f'"{name}" must be one of [{", ".join(COLORS)}]')
    if "emoji" in data and (not isinstance(data["emoji"], str) or re.search(r"[\w\s]", data["emoji"])):
        errors.append('"emoji" must be an emoji')
    if "app_file" in data and not isinstance(data["app_file"], str):
        errors.append('"app_file" must be a string')
    if "short_description" in data and len(str(data["short_description"])) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    if "pinned" in data and not isinstance(data["pinned"], bool):
        errors.append('"pinned" must be a boolean')
    return errors
