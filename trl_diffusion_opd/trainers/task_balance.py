# SPDX-License-Identifier: Apache-2.0
"""Weights of tasks that follow how far each has come."""

from collections.abc import Iterable


DECAY = 0.9


class TaskBalance:
    """
    Weighs a task by how much of its first loss is left: `w_m` in proportion to `(L_m / L_m(0))^p`, with the mean 1. `L_m`
    is a moving average of its losses.

    Args:
        tasks (`Iterable[str]`):
            The tasks.
        exponent (`float`):
            `p`; 0 weighs all alike.
    """

    def __init__(self, tasks: Iterable[str], exponent: float):
        self.tasks, self.exponent = list(tasks), exponent
        self.first: dict[str, float] = {}
        self.average: dict[str, float] = {}
        self._of_round: dict[str, list[float]] = {}

    def weights(self) -> dict[str, float]:
        """The weight of each task, 1 until all have a loss."""
        if self.exponent == 0 or len(self.first) < len(self.tasks):
            return dict.fromkeys(self.tasks, 1.0)
        left = {task: (self.average[task] / max(self.first[task], 1e-30)) ** self.exponent for task in self.tasks}
        mean = sum(left.values()) / len(left)
        return {task: value / mean if mean > 0 else 1.0 for task, value in left.items()}

    def add(self, losses: dict[str, float], *, is_last: bool = True) -> None:
        """The losses of a micro-round, by task. The weights change after the last one of a round."""
        for task, loss in losses.items():
            self._of_round.setdefault(task, []).append(loss)
        if not is_last:
            return
        for task, of_task in self._of_round.items():
            loss = sum(of_task) / len(of_task)
            self.first.setdefault(task, loss)
            self.average[task] = DECAY * self.average.get(task, loss) + (1 - DECAY) * loss
        self._of_round = {}

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"first": dict(self.first), "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self.first, self.average = dict(state["first"]), dict(state["average"])
