# SPDX-License-Identifier: Apache-2.0
"""Runs the README's first command and checks what it promises: the student has 90 % of each teacher's gain."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trl_diffusion_opd.evaluation.gains import gains


root = Path(__file__).parents[1]
with tempfile.TemporaryDirectory() as folder:
    start = time.time()
    command = ["accelerate", "launch", "--quiet", str(root / "examples/train_opd.py"), "--output_dir", folder]
    subprocess.run(command, check=True, cwd=root)
    seconds = time.time() - start
    results = json.loads((Path(folder) / "results.json").read_text())
    shares = gains(results)
    print(f"default run: {seconds:.0f} s, share of the teachers' gains {shares}")
    for name in ("curves.png", "pytorch_lora_weights.safetensors", "README.md"):
        if not (Path(folder) / name).is_file():
            sys.exit(f"The default run wrote no {name}.")
    if min(shares.values()) < 0.9:
        sys.exit("The student has less than 90 % of a teacher's gain.")
