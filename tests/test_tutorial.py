"""The saved tutorial is complete, executed, within its limits, and consistent with the modules."""
import ast
import builtins
import json
import math
import re
from pathlib import Path

import pytest
import torch

import data
import dpo
import model
import train

PATH = Path(dpo.__file__).with_name("tutorial.ipynb")
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
NODES = [node for source in SOURCES for node in ast.walk(ast.parse(source))]
PART_II = next(i for i, (_, text) in enumerate(CELLS) if text.startswith("# Part II"))


def number_of_words(cells):
    return sum(len(text.split()) for kind, text in cells if kind == "markdown")


def test_cells_were_executed_in_order_without_errors_and_warnings():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert not any(output.get("name") == "stderr" for output in cell["outputs"])


def test_the_notebook_and_its_first_part_are_within_their_limits():
    first = CELLS[:PART_II]
    assert len(CELLS) <= 120 and len(first) <= 60
    assert sum(kind == "code" for kind, _ in first) <= 26
    assert number_of_words(CELLS) <= 5500 and number_of_words(first) <= 2800
    assert sum(source.count("\n") + 1 for source in SOURCES) <= 800
    figures = sum("image/png" in output.get("data", {}) for cell in CODE for output in cell["outputs"])
    assert 12 <= figures <= 18 and PATH.stat().st_size < 2e6


def test_code_cells_are_short():
    for source in SOURCES:
        assert source.count("\n") < 25 and max(map(len, source.split("\n"))) <= 120, source


def test_no_sentence_has_more_than_30_words():
    for kind, text in CELLS:
        if kind == "markdown":
            text = re.sub(r"```.*?```|\$\$.*?\$\$|^\|.*?$|^    .*?$", "\n\n", text, flags=re.S | re.M)
            text = re.sub(r"\$[^$]*\$|`[^`]*`|\[([^\]]*)\]\([^)]*\)", "x", text)
            for part in re.split(r"(?<=[.!?:;])\s+|\n\s*\n|\n(?=[-\d#])", text):
                assert len(part.split()) <= 30, part


def test_text_has_no_control_characters():
    """Such characters are left over if a backslash of a formula is lost."""
    assert not any(re.search("[\x00-\x08\x0b-\x1f]", text) for _, text in CELLS)


def test_chapters_are_in_order():
    text = "\n".join(text for kind, text in CELLS if kind == "markdown")
    assert re.findall(r"^## (\w+)\. ", text, re.M) == [*"0123456789", *"ABCDEFG"]
    assert len(re.findall(r"^# ", text, re.M)) == 2


@pytest.mark.parametrize("number", range(1, 8))
def test_an_equation_is_typeset_where_it_is_first_mentioned(number):
    first = next(text for kind, text in CELLS if kind == "markdown" and f"Eq. {number}" in text)
    assert "$$" in first


def bound_and_used(sources):
    """Names that sources bind anywhere, and names that they use."""
    bound, used = set(), set()
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name for alias in node.names}
    return bound, used


def test_each_chapter_of_part_two_needs_part_one_and_the_tools_alone():
    starts = [i for i, (_, text) in enumerate(CELLS) if re.match(r"## [A-G]\. ", text)]
    base, _ = bound_and_used([text for kind, text in CELLS[:starts[0]] if kind == "code"])
    for start, end in zip(starts, [*starts[1:], len(CELLS)]):
        bound, used = bound_and_used([text for kind, text in CELLS[start:end] if kind == "code"])
        assert used <= bound | base | set(dir(builtins)), used - bound - base - set(dir(builtins))


@pytest.mark.parametrize("module", [data, dpo, model, train])
def test_names_taken_from_a_module_exist_and_are_not_defined_again(module):
    used = {alias.name for node in NODES if isinstance(node, ast.ImportFrom)
            and node.module == module.__name__ for alias in node.names}
    used |= {node.attr for node in NODES if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id == module.__name__ and module is not model}
    assert used and all(hasattr(module, name) for name in used), used
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    assert not own & {node.name for node in NODES if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_one_loop_is_visible_and_all_other_training_uses_train_fit():
    calls = [node.func.attr for node in NODES if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert calls.count("fit") == 1 and calls.count("step") == 1


def test_one_cell_makes_the_picture_of_the_readme():
    tagged = [cell for cell in CODE if "frontier" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and any("image/png" in output.get("data", {}) for output in tagged[0]["outputs"])


def my_mask(tokens, lengths, pad):
    t = torch.arange(tokens.shape[1])
    return torch.stack([(t >= prompt) & (t < prompt + answer) for prompt, answer in lengths])


SOLUTIONS = {0: 0.3133, 1: 0.1192, 2: 0.9, 3: lambda *x: dpo.dpo_loss(*x)[0], 4: my_mask,
             5: lambda pc, pr, rc, rr, beta: beta * torch.sigmoid(-beta * (pc - rc - pr + rr)),
             6: 0.7311, 7: -1, 8: 0.5498, 9: 2.1972}


@pytest.mark.parametrize("number", SOLUTIONS)
def test_the_check_of_an_exercise_distinguishes_right_wrong_and_unanswered(number):
    names = {"math": math, "torch": torch}
    for source in SOURCES:
        if "RIGHT = {" in source or "def check(" in source:
            exec(source, names)
    assert sorted(names["RIGHT"]) == sorted(SOLUTIONS) and names["answers"] == dict.fromkeys(SOLUTIONS)
    assert names["check"](number, SOLUTIONS[number]) == "right"
    assert names["check"](number, None) == "not answered"
    assert re.match("wrong.* Hint: .", names["check"](number, -123.0))


def test_no_path_of_a_machine_is_stored():
    assert not re.search(r"/(home|root|tmp|var|work|Users)/|[A-Z]:\\\\", json.dumps(NOTEBOOK))
