"""What the tests of the examples share: scripts imported as they import each other, and torch's threads left as they were."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def import_example(name: str, *before: str) -> ModuleType:
    """``examples/<name>.py``, and ``before`` it what it imports only when it needs it."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        for other in before:
            importlib.import_module(other)
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # --tiny asks for one
