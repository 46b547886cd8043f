# SPDX-License-Identifier: Apache-2.0
"""Which options of `from_pretrained` are passed on to diffusers."""

import inspect
from collections.abc import Iterable


# The arguments that `DiffusionPipeline.from_pretrained` takes from its `**kwargs`; diffusers has no list of them. Not
# those for ONNX, which is not trained, and not `proxies`, which `huggingface_hub` ignores.
INIT_KWARGS = frozenset(
    """
    torch_dtype dtype force_download cache_dir token local_files_only revision custom_pipeline custom_revision
    device_map max_memory offload_folder offload_state_dict low_cpu_mem_usage use_safetensors variant
    quantization_config disable_mmap use_flashpack trust_remote_code
    """.split()
)


def check_init_kwargs(names: Iterable[str], pipeline: type, owner: str = "model") -> None:
    """
    Refuses options that `from_pretrained` does not take, by their names alone: diffusers goes on without them and
    prints their values, which may be credentials.

    Args:
        names (`Iterable[str]`):
            The options, such as the keys of `model_init_kwargs`.
        pipeline (`type`):
            Class of the pipeline, whose components are options too.
        owner (`str`, *optional*, defaults to `"model"`):
            Who needs the pipeline, for the error message.

    Raises:
        `ValueError`: an option that is not known.
    """
    components = set(inspect.signature(pipeline.__init__).parameters) - {"self"}
    if unknown := sorted(str(name) for name in set(names) - INIT_KWARGS - components):
        raise ValueError(
            f"{owner}: `model_init_kwargs` has {', '.join(map(repr, unknown))}, which `from_pretrained` does not take. "
            "Leave it out (a proxy is set by the environment variable HTTPS_PROXY), or use one of: "
            f"{', '.join(sorted(INIT_KWARGS))}."
        )
