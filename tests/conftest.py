"""Settings for the whole suite."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import settings
from processors import PROCESSORS, simulate

OLDEST_THRESHOLD = 50
"""Collections of the middle generation before one of the oldest; Python's default is 10."""
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run every n-th test only, for a quick look at all of the package"
    parser.addoption("--every", type=int, default=1, metavar="N", help=text)
    text = "run all tests as on a processor of this kind, one of `processors.PROCESSORS`"
    parser.addoption("--processor", default=None, metavar="KIND", help=text)


def _seed_present_devices_only() -> None:
    """Let `torch.manual_seed` leave out devices that are not there.

    It would keep each seed for them, with the text of the stack, which costs a millisecond.
    """
    for device in (torch.cuda, torch.xpu, getattr(torch, "mtia", None)):
        if hasattr(device, "manual_seed_all") and not device.is_available():
            device.manual_seed_all = lambda seed: None


def pytest_configure(config: pytest.Config) -> None:
    """Share the processor's cores among the processes that run tests, and those that they start.

    Collection makes hundreds of thousands of objects that stay, and no garbage.
    """
    _seed_present_devices_only()
    if (worker := getattr(config, "workerinput", None)) is not None:
        threads = max(1, torch.get_num_threads() // worker["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        gc.disable()
    else:  # those that run tests are not started yet; their threads wait without spinning
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_sessionstart(session: pytest.Session) -> None:
    kind = session.config.getoption("--processor")
    if kind is None:
        return
    if kind not in PROCESSORS:
        raise pytest.UsageError(f"--processor must be one of {tuple(PROCESSORS)}, got {kind!r}.")
    simulate(kind)


def pytest_report_header(config: pytest.Config) -> str:
    return f"processor: {config.getoption('--processor') or 'detected'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("every")]


@pytest.fixture(autouse=True)
def _same_random_numbers(request: pytest.FixtureRequest) -> None:
    """Let each test draw the same numbers, in whatever order tests run, and alone.

    Modules whose tests draw from a generator of their own call it ``GENERATOR``.
    """
    torch.manual_seed(0)
    own = getattr(getattr(request.node, "module", None), "GENERATOR", None)
    if isinstance(own, torch.Generator):
        own.manual_seed(2)


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of garbage collections, which it makes slow.

    The oldest generation, in which caches of torch stay, is looked through less often.
    """
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], OLDEST_THRESHOLD)
    gc.enable()
