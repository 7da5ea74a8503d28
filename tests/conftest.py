"""Shape checks on every annotated signature of raydream, one thread, and a quiet Ray, for every test run."""

import os
from collections.abc import Generator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAYDREAM_MADE_UP_GPUS", "1")  # of the clusters that tests start

from jaxtyping import install_import_hook

_HOOK = install_import_hook("raydream", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from asset_cases import MINIPACK  # noqa: E402
from store_cases import place  # noqa: E402, F401  (a fixture of several files)

torch.set_num_threads(1)
if MINIPACK.is_dir():
    os.environ.setdefault("RAYDREAM_ASSETS", str(MINIPACK))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


_NOT_HERE = ("CUDA", "GPU", "root", "asset", "only the canned service")  # words of reasons that a CPU box may have


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="a test that is skipped for a missing part fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With ``--everything`` all parts are at hand: a skip that names one is a failure, not a way to pass."""
    report = yield
    if report.skipped and item.config.getoption("everything") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not any(word in reason for word in _NOT_HERE):
            report.outcome, report.longrepr = "failed", f"skipped though everything is at hand: {reason}"
    return report
