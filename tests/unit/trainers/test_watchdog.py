# SPDX-License-Identifier: Apache-2.0
"""Signs of life between the processes of a run."""

import torch.distributed as dist

from trl_diffusion_opd.trainers.watchdog import Watchdog, watching_others


def beat(*watchdogs: Watchdog) -> list[str | None]:
    for watchdog in watchdogs:
        watchdog.exchange()
    return [watchdog.tick() for watchdog in watchdogs]


def test_a_silent_process_is_told_once_in_a_while_by_one_of_the_others():
    store = dist.HashStore()
    first, second, third = (Watchdog(store, rank, 3, beat=10, patience=30) for rank in range(3))
    for _ in range(5):
        assert beat(first, second, third) == [None] * 3
    lines = [beat(first, third) for _ in range(6)]
    told = {count: line for count, (line, other) in enumerate(lines) if line or other}
    assert list(told) == [2, 5], "after 30 and 60 s; the first beat found the last sign"
    assert told[2].startswith("No sign of life from process 1 since 30 s: the others wait.")
    assert told[5].startswith("No sign of life from process 1 since 60 s")
    assert all(other is None for _, other in lines)
    assert beat(first, second, third) == [None] * 3, "and it is back"


def test_the_next_process_tells_if_the_first_is_silent():
    store = dist.HashStore()
    first, second, third = (Watchdog(store, rank, 3, beat=1, patience=2) for rank in range(3))
    beat(first, second, third)
    lines = [beat(second, third) for _ in range(4)]
    assert [bool(line) for line, _ in lines].count(True) == 2 and not any(line for _, line in lines)
    assert "process 0 since 2 s" in next(line for line, _ in lines if line)


def test_a_process_that_was_stopped_itself_takes_nobody_for_silent():
    """While it is stopped it counts no beats, however late it is afterwards."""
    store = dist.HashStore()
    first, second = (Watchdog(store, rank, 2, beat=1, patience=3) for rank in range(2))
    beat(first, second)
    for _ in range(10):
        second.exchange()
    assert first.tick() is None and beat(first, second) == [None] * 2


def test_one_process_watches_nobody():
    with watching_others():
        pass
