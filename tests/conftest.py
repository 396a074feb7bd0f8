"""Uninitialised memory is NaN in every test: an output element that a kernel does not write shows."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("xsep", deadline=None, derandomize=True)
settings.load_profile("xsep")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets torch's number of threads; the test's changes end with it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
