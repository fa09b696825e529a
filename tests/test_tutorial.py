"""The tutorial as it is saved: whole, run, without errors, and in step with the modules."""
import ast
import json
import os
import re

import pytest

import data
import dpo
import model
import train

PATH = os.path.join(os.path.dirname(os.path.abspath(dpo.__file__)), "tutorial.ipynb")
with open(PATH, encoding="utf-8") as file:
    NOTEBOOK = json.load(file)
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]


def test_it_is_a_notebook_whose_code_parses():
    assert NOTEBOOK["nbformat"] == 4 and {cell["cell_type"] for cell in NOTEBOOK["cells"]} == {"code", "markdown"}
    for source in SOURCES:
        ast.parse(source)


def test_every_code_cell_was_run_in_order_and_shows_something_but_no_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell, source in zip(CODE, SOURCES):
        assert cell["outputs"], f"no output: {source[:60]}"
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert not any(output.get("name") == "stderr" for output in cell["outputs"])


def test_cells_are_short_and_most_end_in_a_check():
    assert max(source.count("\n") + 1 for source in SOURCES) <= 25
    assert sum("assert " in source for source in SOURCES) >= 0.9 * len(SOURCES)


def test_chapters_are_numbered_in_order():
    text = "\n".join("".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "markdown")
    chapters = re.findall(r"^## (\d+)\. ", text, re.M)
    assert chapters == [str(i) for i in range(len(chapters))] and len(re.findall(r"^# ", text, re.M)) == 1


@pytest.mark.parametrize("module", [data, dpo, model, train])
def test_every_name_taken_from_a_module_exists_and_none_is_defined_again(module):
    nodes = [node for source in SOURCES for node in ast.walk(ast.parse(source))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == module.__name__
            for alias in node.names}
    if module.__name__ in imported:
        used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)
                 and isinstance(node.value, ast.Name) and node.value.id == module.__name__}
    assert used and all(hasattr(module, name) for name in used), used
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not own & defined


def test_it_holds_no_path_of_the_machine_it_ran_on():
    text = json.dumps(NOTEBOOK)
    assert not re.search(r"/(home|root|tmp|var|Users)/|[A-Z]:\\\\", text)
