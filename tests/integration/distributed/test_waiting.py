# SPDX-License-Identifier: Apache-2.0
"""A process that waits for another one that is stopped says so."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "support" / "distributed_wait.py"


@pytest.mark.slow
def test_a_stopped_process_is_told_by_the_one_that_waits_for_it():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    commands = [[sys.executable, str(SCRIPT), str(rank), str(port)] for rank in range(2)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    (out, told), (other_out, other_told) = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told + other_told
    assert out == other_out == "sum 2\n"
    lines = [line for line in told.splitlines() if "No sign of life" in line]
    assert 1 <= len(lines) <= 3 and lines[0].startswith("No sign of life from process 1 since 1 s: the others wait.")
    assert "No sign of life" not in other_told
