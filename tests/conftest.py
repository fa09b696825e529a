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


class SmallRun:
    """train.py in the background, so that other tests run meanwhile."""
    process = folder = None

    def start(self):
        if self.process is None:
            self.folder = pathlib.Path(tempfile.mkdtemp())
            arguments = f"--sft_steps 500 --steps 400 --n_pairs 8192 --device cpu --out {self.folder}/out".split()
            self.process = subprocess.Popen([sys.executable, ROOT / "train.py", *arguments], stdout=subprocess.PIPE,
                                            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.folder)


SMALL = SmallRun()


@pytest.fixture(scope="session")
def small():
    """The small run: (finished process, its folder)."""
    SMALL.start()
    stdout, stderr = SMALL.process.communicate()
    return subprocess.CompletedProcess(SMALL.process.args, SMALL.process.returncode, stdout, stderr), SMALL.folder / "out"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than a minute")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "small" in item.fixturenames)  # the run has time until then
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long: run with --slow"))


def pytest_collection_finish(session):
    if not session.config.option.collectonly and any("small" in item.fixturenames for item in session.items):
        SMALL.start()


def pytest_unconfigure(config):
    """Also after a failure with -x and after Ctrl-C."""
    SMALL.stop()
