# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.support.hub_server import HubServer


@pytest.fixture(autouse=True)
def _as_users_run(monkeypatch):
    """TRL skips code where `CI` is set, and users do not have it set. One thread: the models are tiny."""
    monkeypatch.delenv("CI", raising=False)
    torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path):
    """A running [`HubServer`] with nothing in it."""
    with HubServer(tmp_path / "hub") as server:
        yield server
