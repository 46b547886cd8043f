# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    """TRL skips code where `CI` is set, and users do not have it set. One thread: the models are tiny."""
    monkeypatch.delenv("CI", raising=False)
    torch.set_num_threads(1)
