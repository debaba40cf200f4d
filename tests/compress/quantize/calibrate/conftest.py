from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def see():
    """An observer that was shown these batches."""

    def show(observer, *batches):
        for batch in batches:
            observer.update(torch.as_tensor(batch, dtype=torch.float32))
        return observer

    return show
