"""What tests share: one small run of the whole story. Long tests run with `python -m pytest --slow`."""
import os
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)  # the tests' products are so small that two threads would wait for each other


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than a minute")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long: run with --slow"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """One small run of the whole story, piped: (finished process, its folder)."""
    out = tmp_path_factory.mktemp("small") / "out"
    arguments = f"--sft_steps 500 --steps 400 --n_pairs 8192 --device cpu --out {out}".split()
    return subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *arguments], capture_output=True, text=True), out
