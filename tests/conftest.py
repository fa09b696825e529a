"""Shared by the tests: one small run of the whole pipeline. `python -m pytest --slow` adds long tests."""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the products in the tests are too small for two threads


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than a minute")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "small" in item.fixturenames)  # other tests run while the small run trains
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long: run with --slow"))


def pytest_collection_finish(session):
    """Start the small run in the background."""
    if any("small" in item.fixturenames for item in session.items) and not session.config.option.collectonly:
        out = tempfile.mkdtemp()
        arguments = f"--sft_steps 500 --steps 400 --n_pairs 8192 --device cpu --out {out}/out".split()
        session.small = out, subprocess.Popen([sys.executable, ROOT / "train.py", *arguments], stdout=subprocess.PIPE,
                                              stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})


@pytest.fixture(scope="session")
def small(request):
    """One small run of the whole pipeline: (finished process, its folder)."""
    out, process = request.session.small
    stdout, stderr = process.communicate()
    yield subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr), pathlib.Path(out, "out")
    shutil.rmtree(out)
