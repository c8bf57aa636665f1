"""GPU tests skip where torch sees no CUDA device."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side, a worker a core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))
