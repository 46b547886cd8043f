# SPDX-License-Identifier: Apache-2.0
"""Runs that push, for a process of their own: `python -c "from tests.support.push_runs import strategies; ..."`."""

import json
import traceback
from pathlib import Path

from tests.support.runs import make_trainer


PUSHING = {
    "push_to_hub": True,
    "hub_always_push": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 4,
    "num_grid_prompts": 1,
    "save_curves": True,
}


def push_run(folder: str, **settings) -> dict:
    """Trains and pushes; tells what was raised."""
    trainer = make_trainer(Path(folder), **{**PUSHING, **settings})
    trainer.train()
    try:
        commit = trainer.push_to_hub()
        return {"repo": trainer.hub_model_id, "url": commit.commit_url}
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}


def report(results) -> None:
    print("RESULTS" + json.dumps(results))


def reported(done) -> object:
    """What [`report`] printed in a finished process."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULTS")[2])
