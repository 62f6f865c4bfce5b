"""The experts' loads of the newest log entries: lists, which the loggers of scalars would not take."""

from dataclasses import dataclass

Loads = dict[str, list[float]]
"""For each sparse layer, by its name `layer_N` in the metrics: every expert's share of the assignments, sum 1."""


@dataclass
class LatestLoads:
    """The loads that belong to the newest training entry and to the newest evaluation.

    Whoever measures them sets the field, to `None` where nothing was measured, right before each such entry is logged.
    Callbacks only read, so that their order does not matter and none takes away what another needs.
    """

    train: Loads | None = None
    eval: Loads | None = None

    def of(self, logs: dict[str, float]) -> Loads | None:
        """Return the loads that belong to the entry being logged; `None` for an entry of another kind."""
        if "loss" in logs:
            return self.train
        return self.eval if "eval_loss" in logs else None
