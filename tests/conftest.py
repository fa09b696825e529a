"""What tests share: one small run of the whole story. Long tests run with `python -m pytest --slow`."""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)  # the tests' products are so small that two threads would wait for each other


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than a minute")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "small" in item.fixturenames)  # while the small run goes on, others come first
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long: run with --slow"))


def pytest_collection_finish(session):
    """Start the small run at once, beside the tests that do not need it."""
    if any("small" in item.fixturenames for item in session.items) and not session.config.option.collectonly:
        out = tempfile.mkdtemp()
        arguments = f"--sft_steps 500 --steps 400 --n_pairs 8192 --device cpu --out {out}/out".split()
        session.small = out, subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *arguments],
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def small(request):
    """One small run of the whole story, piped: (finished process, its folder)."""
    out, process = request.session.small
    stdout, stderr = process.communicate()
    yield subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr), pathlib.Path(out, "out")
    shutil.rmtree(out)
