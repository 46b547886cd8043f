# SPDX-License-Identifier: Apache-2.0
"""One line for what is refused, a traceback for a bug, silence if nobody reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_diffusion_opd.cli.parser import BAD_INPUT, CLOSED_PIPE, one_line_errors
from trl_diffusion_opd.cli.recipe_file import unique_pairs
from trl_diffusion_opd.data.tasks import check_task_name
from trl_diffusion_opd.hub.errors import SourceError


ROOT = Path(__file__).parents[3]


def test_what_this_package_refuses_is_one_line_wherever_it_is_raised(capsys):
    with pytest.raises(SystemExit) as info, one_line_errors():
        check_task_name("a/b\nc")
    assert info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: A task must be a name that files can have, but 'a/b\\nc' has '/'.")
    assert error.count("\n") == 1


def of_others():
    raise ValueError("of a reward function, say")


def of_a_function_that_ours_calls():
    unique_pairs([([], None)])  # a list is no key: a bug, not a refusal


@pytest.mark.parametrize(
    ("call", "kind"),
    [(of_others, ValueError), (of_a_function_that_ours_calls, TypeError), (lambda: 1 / 0, ZeroDivisionError)],
)
def test_what_others_raise_is_a_bug_unless_it_is_named(call, kind, capsys):
    with pytest.raises(kind), one_line_errors():
        call()
    with pytest.raises(SystemExit) as info, one_line_errors(kind):
        call()
    assert info.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_errors_of_a_source_are_bad_input(capsys):
    with pytest.raises(SystemExit), one_line_errors(*BAD_INPUT):
        raise SourceError("teacher 'ocr':\n  it is not there")
    assert capsys.readouterr().err == "error: teacher 'ocr': it is not there\n"


def test_a_pipe_that_broke_elsewhere_is_not_hidden(capfd):
    with pytest.raises(SystemExit) as info, one_line_errors(*BAD_INPUT):
        raise BrokenPipeError("the connection to the server")
    assert info.value.code == 2 and capfd.readouterr().err == "error: the connection to the server\n"


MANY_LINES = (
    "from trl_diffusion_opd.cli.parser import one_line_errors\nwith one_line_errors():\n    print('x\\n' * 99999)"
)


@pytest.mark.parametrize(
    "command", [["-c", MANY_LINES], ["-m", "trl_diffusion_opd", "rewards"]], ids=["print", "rewards"]
)
def test_output_that_nobody_reads_ends_it_silently(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, b"")
