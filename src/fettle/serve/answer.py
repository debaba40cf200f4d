"""The rows that a model answered for one request."""

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
