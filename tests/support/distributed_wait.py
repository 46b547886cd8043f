# SPDX-License-Identifier: Apache-2.0
"""One of two processes is stopped for some seconds while the other waits for it in a reduction. Arguments: rank, port."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parents[2]))

from trl_diffusion_opd.trainers import watchdog  # noqa: E402


if __name__ == "__main__":
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    watchdog.BEAT, watchdog.PATIENCE = 0.1, 1.0
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with watchdog.watching_others():
        time.sleep(0.5)
        if rank == 1:
            subprocess.Popen(
                [sys.executable, "-c", f"import os, time; time.sleep(3); os.kill({os.getpid()}, {signal.SIGCONT})"]
            )
            os.kill(os.getpid(), signal.SIGSTOP)
        value = torch.ones(1)
        dist.all_reduce(value)
        print(f"sum {value.item():g}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
