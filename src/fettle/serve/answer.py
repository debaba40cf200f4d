"""The rows that a model answered, for one request or for several."""

from __future__ import annotations

from dataclasses import dataclass

from fettle.core.signature import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """outputs: by name. probabilities: (rows, classes), None where the model is no classifier.

    statistics: (rows, 5) of the inputs, None where nothing is logged.
    """

    outputs: dict[str, Array]
    probabilities: Array | None = None
    statistics: Array | None = None

    def part(self, start: int, stop: int) -> Answer:
        """These rows of it, as views.

        >>> import numpy as np
        >>> Answer(outputs={"y": np.arange(4)}).part(1, 3).outputs
        {'y': array([1, 2])}
        """
        return Answer(
            outputs={name: array[start:stop] for name, array in self.outputs.items()},
            probabilities=None if self.probabilities is None else self.probabilities[start:stop],
            statistics=None if self.statistics is None else self.statistics[start:stop],
        )
