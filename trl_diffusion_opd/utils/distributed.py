# SPDX-License-Identifier: Apache-2.0
"""What each process of several needs to know: whether they found each other, and its share of the cores."""

import os

import torch


def use_all_cores(device: torch.device) -> None:
    """Lets a process on the CPU use its share of the cores: `accelerate launch` leaves it one thread by default."""
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_processes(num_processes: int) -> None:
    """
    Checks that the processes that a launcher started found each other. Else each would do all the work alone and write
    over the others.

    Args:
        num_processes (`int`):
            How many processes accelerate knows of.

    Raises:
        `ValueError`: fewer than were started.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        raise ValueError(
            f"{started} processes were started, but on a CPU they find each other only with `use_cpu`. Set it "
            "(`--use_cpu`)."
        )
