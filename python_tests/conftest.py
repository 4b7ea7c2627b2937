from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from recycle_ext import _C
from recycle_ext.checkpoint.default_model import default_model_path

# One example may take a while on a shared machine; that is not what is tested.
hypothesis.settings.register_profile("recycle", deadline=None, derandomize=True)
hypothesis.settings.load_profile("recycle")

# A shell that runs the tests in the background makes them ignore Ctrl-C, and with them the programs they
# start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need more than this package and its extras run only when they are asked for."""
    if "vllm" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="opt-in: `pytest -m vllm`, with the set-up in CONTRIBUTING.md")
    for item in items:
        if "vllm" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=_C.runnable_isas())
def isa(request) -> Iterator[str]:
    """Each instruction set of this build that this processor runs."""
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


THREADS, TORCH_THREADS = _C.n_threads(), torch.get_num_threads()


@pytest.fixture(autouse=True)
def _same_settings_for_every_test() -> Iterator[None]:
    yield
    # Not what it was before this test: a fixture of a whole file may have changed it.
    _C.set_n_threads(THREADS)
    torch.set_num_threads(TORCH_THREADS)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once a machine."""
    return default_model_path()
