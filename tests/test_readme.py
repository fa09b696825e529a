"""What the README says and shows is so."""
import ast
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F

import data
import dpo
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.abspath(dpo.__file__))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_loss_on_the_first_screen_is_the_loss_of_dpo_py():
    shown = {"F": F}
    exec(SNIPPETS[0], shown)
    four = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    for a, b in zip(shown["dpo_loss"](*four, 0.7), dpo.dpo_loss(*four, 0.7)):
        assert torch.equal(a, b)


def test_the_snippet_to_copy_runs_and_starts_at_ln_2():
    tokenizer = data.toy_tokenizer()
    prompt = "Last night we saw a thriller:"
    tokens, _, answers, _ = data.collate([data.encode(tokenizer, prompt, y) for y in (" tense superb", " dull")])
    model = GPT(GPTConfig(tokenizer.n_vocab))
    shown = {"torch": torch, "sequence_logps": dpo.sequence_logps, "dpo_loss": dpo.dpo_loss, "tokens": tokens,
             "mask": answers > 0, "policy": model, "reference": model}
    exec(SNIPPETS[1], shown)
    assert shown["losses"].item() == pytest.approx(0.693, abs=1e-3)
    assert model.wte.weight.grad.abs().max() > 0


def test_the_file_map_has_the_files_and_their_lines():
    rows = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert set(rows) == {"dpo.py", "model.py", "data.py", "train.py"}
    for name, lines in rows.items():
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            count = sum(bool(line.strip()) for line in file)  # code, docstrings and comments
        assert count == int(lines), f"{name}: the README says {lines} lines, it has {count}"


def test_every_flag_in_the_readme_exists():
    import train
    flags = set(re.findall(r"(?<!\w)--(\w+)", README))
    of_tests = set()
    for name in ("benchmark.py", "conftest.py"):
        with open(os.path.join(ROOT, "tests", name), encoding="utf-8") as file:
            of_tests |= set(re.findall(r'(?:add_argument|addoption)\("--(\w+)"', file.read()))
    assert flags and flags <= {f.name for f in train.fields(train.Config)} | of_tests


def test_requirements_are_the_four():
    with open(os.path.join(ROOT, "requirements.txt")) as file:
        assert [re.split("[<>=,]", line.strip())[0] for line in file] == ["torch", "numpy", "tiktoken", "pytest"]


@pytest.mark.parametrize("name, allowed", [
    ("dpo", {"torch"}), ("model", {"torch"}), ("data", {"torch", "numpy", "tiktoken"}),
    ("train", {"torch", "numpy", "data", "dpo", "model"})])
def test_each_module_imports_what_it_may_know(name, allowed):
    with open(os.path.join(ROOT, name + ".py"), encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names) == allowed
