from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from recycle_ext import _C
from recycle_ext.checkpoint.default_model import default_model_path

# No deadline: on a shared machine a single example can take seconds.
hypothesis.settings.register_profile("recycle", deadline=None, derandomize=True)
hypothesis.settings.load_profile("recycle")

# A shell that starts pytest in the background makes the process ignore SIGINT, and its child processes inherit that.
# Some tests interrupt child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the vLLM tests, which need an environment of their own, unless ``-m vllm`` asks for them."""
    if "vllm" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="opt-in: `pytest -m vllm`, with the set-up in CONTRIBUTING.md")
    for item in items:
        if "vllm" in item.keywords:
            item.add_marker(skip)


def pytest_report_header() -> str:
    """Names the instruction sets, because tests of the others do not run."""
    built, tested = _C.build_info()["cpu_targets"], ", ".join(_C.runnable_isas())
    return f"recycle_ext: built for {built}; this processor runs {tested}"


@pytest.fixture(params=_C.runnable_isas())
def isa(request) -> Iterator[str]:
    """Runs a test with each instruction set that this build has and this processor runs."""
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


TORCH_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _same_settings_for_every_test() -> Iterator[None]:
    yield
    # The number at the start of the session: a fixture of a whole file may have changed the one before this test.
    _C.set_n_threads(None)
    torch.set_num_threads(TORCH_THREADS)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The file of SmolLM2-135M-Instruct; fetched on a machine's first run."""
    return default_model_path()
