# SPDX-License-Identifier: Apache-2.0
"""Tell when another process of a run gives no sign of life, while this one waits for it."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


logger = logging.getLogger(__name__)
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one until it is told, and from then on between two lines


class Watchdog:
    """
    Exchanges signs of life with the other processes of a run. Time is counted in beats of this process, so that one that
    was stopped itself does not take the others for silent.

    Args:
        store (`torch.distributed.Store`):
            What the processes share.
        rank (`int`), world_size (`int`):
            This process among them.
        beat (`float`, *optional*, defaults to `10`), patience (`float`, *optional*, defaults to `60`):
            Seconds between two signs of life, and without one until it is told.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, beat: float = BEAT, patience: float = PATIENCE):
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.beat = beat
        self.patience = patience
        self.silence = {other: 0 for other in range(world_size) if other != rank}  # in beats
        self._beats = 0
        self._heard = dict.fromkeys(self.silence, b"")
        self._stopped = threading.Event()

    def exchange(self) -> None:
        """Gives a sign of life and looks for those of the others. Waits if the store's own process is stopped."""
        self._beats += 1
        self.store.set(f"alive/{self.rank}", str(self._beats))
        for other, heard in self._heard.items():
            key = f"alive/{other}"
            sign = self.store.get(key) if self.store.check([key]) else b""
            if sign != heard:
                self._heard[other], self.silence[other] = sign, 0

    def tick(self) -> str | None:
        """Counts a beat. Returns the line that is to be told after it, if any."""
        for other in self.silence:
            self.silence[other] += 1
        every = max(1, round(self.patience / self.beat))
        silent = {other: beats for other, beats in self.silence.items() if beats >= every}
        first = min(set(range(self.world_size)) - silent.keys())
        if not silent or first != self.rank or max(silent.values()) % every:
            return None
        names = ", ".join(map(str, silent))
        return (
            f"No sign of life from process {names} since {max(silent.values()) * self.beat:.0f} s: the others wait. Look "
            "after it, or stop the run and resume it from its last checkpoint."
        )

    def start(self) -> None:
        """Begins to exchange and to tell, in two threads, as an exchange may have to wait."""
        for loop in (self._exchange_on, self._tell_on):
            threading.Thread(target=loop, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _exchange_on(self) -> None:
        try:
            while not self._stopped.wait(self.beat):
                self.exchange()
        except RuntimeError:  # the store is gone: the run ends
            self.stop()

    def _tell_on(self) -> None:
        while not self._stopped.wait(self.beat):
            if line := self.tick():
                logger.warning(line)


@contextmanager
def watching_others() -> Iterator[None]:
    """Watches over the other processes, if there are any, as long as it is entered."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    # The only store that all processes share on every launcher. It has no public name.
    store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
    watchdog = Watchdog(store, dist.get_rank(), dist.get_world_size(), BEAT, PATIENCE)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()
