"""The tutorial as it is saved: whole, run, without errors, and in step with the modules."""
import ast
import json
import math
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
TREES = [ast.parse(source) for source in SOURCES]
NODES = [node for tree in TREES for node in ast.walk(tree)]
EXERCISES = range(1, 8)


def test_it_is_a_notebook_of_code_and_text_and_small_enough_for_a_web_page():
    assert NOTEBOOK["nbformat"] == 4 and {cell["cell_type"] for cell in NOTEBOOK["cells"]} == {"code", "markdown"}
    assert os.path.getsize(PATH) < 2e6


def test_every_code_cell_was_run_in_order_and_shows_something_but_no_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell, source in zip(CODE, SOURCES):
        assert cell["outputs"], f"no output: {source[:60]}"
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert not any(output.get("name") == "stderr" for output in cell["outputs"])


def test_cells_are_short_stand_after_a_paragraph_and_end_in_a_check_or_a_picture():
    for source in SOURCES:
        assert source.count("\n") < 15, source
        assert max(map(len, source.split("\n"))) <= 100, source
        assert re.search(r"assert |observe\(|plt\.show\(\)", source), source
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    assert all(before == "markdown" for before, kind in zip(kinds, kinds[1:]) if kind == "code")


def test_chapters_are_numbered_in_order():
    text = "\n".join("".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "markdown")
    chapters = re.findall(r"^## (\d+)\. ", text, re.M)
    assert chapters == [str(i) for i in range(len(chapters))] and len(re.findall(r"^# ", text, re.M)) == 1
    assert "TODO" not in text


@pytest.mark.parametrize("module", [data, dpo, model, train])
def test_every_name_taken_from_a_module_exists_and_none_is_defined_again(module):
    imported = {alias.name for node in NODES if isinstance(node, ast.Import) for alias in node.names}
    used = {alias.name for node in NODES if isinstance(node, ast.ImportFrom) and node.module == module.__name__
            for alias in node.names}
    if module.__name__ in imported:
        used |= {node.attr for node in NODES if isinstance(node, ast.Attribute)
                 and isinstance(node.value, ast.Name) and node.value.id == module.__name__}
    assert used and all(hasattr(module, name) for name in used), used
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    defined = {node.name for node in NODES if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not own & defined


def kind_of(value):
    """What an assigned expression certainly is, else None."""
    if isinstance(value, ast.Lambda):
        return "function"
    for kinds, name in (((ast.List, ast.ListComp), "list"), ((ast.Dict, ast.DictComp), "dict"),
                        ((ast.JoinedStr,), "text")):
        if isinstance(value, kinds):
            return name
    if isinstance(value, ast.Constant):
        return "number" if isinstance(value.value, (int, float)) else type(value.value).__name__
    return None


def test_no_name_is_bound_to_two_kinds_of_things():
    """At the top level of cells: modules, functions, classes, lists, dicts, numbers and texts stay what they are."""
    kinds, fixed = {}, {}  # name -> kinds seen; name -> number of definitions as function, class or import
    for tree in TREES:
        top = [node for node in ast.walk(tree) if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
        inside = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
                  for node in ast.walk(f) if node is not f}
        for node in top:
            if id(node) in inside:
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    fixed.setdefault((alias.asname or alias.name).split(".")[0], []).append("import")
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and kind_of(node.value):
                        kinds.setdefault(target.id, set()).add(kind_of(node.value))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                kinds.setdefault(node.id, set())
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                fixed.setdefault(node.name, []).append("definition")
    assert not {name for name, found in kinds.items() if len(found) > 1}
    assert not set(kinds) & set(fixed), "a function, class or module is also a variable"
    assert not {name for name, times in fixed.items() if len(times) > 1}, "defined twice"


def test_everything_learns_in_the_repositorys_loop_without_stand_ins():
    for node in NODES:
        if isinstance(node, ast.ClassDef):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            assert not methods & {"start", "step"}, node.name
    calls = [node for node in NODES if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert sum(call.func.attr == "fit" for call in calls) == 1
    assert sum(call.func.attr == "step" for call in calls) == 1  # three steps by hand, in one loop


def test_the_picture_of_the_readme_is_there():
    tagged = [cell for cell in CODE if "frontier" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and any("image/png" in output.get("data", {}) for output in tagged[0]["outputs"])


@pytest.mark.parametrize("number", EXERCISES)
def test_the_check_of_the_exercises_knows_all_three_answers(number):
    names = {"math": math}
    sources = [source for source in SOURCES if source.startswith("RIGHT = ") or "def check(" in source]
    assert len(sources) == 2
    for source in sources:
        exec(source, names)
    assert sorted(names["RIGHT"]) == list(EXERCISES)
    low, high, _ = names["RIGHT"][number]
    right = low if low == high else (low + high) / 2
    assert names["check"](number, None) == "not answered yet"
    assert names["check"](number, right) == "right"
    assert names["check"](number, -123.0).startswith("wrong, because ")


def test_answers_are_left_to_the_reader():
    source, = [source for source in SOURCES if source.startswith("answers_to = ")]
    answers = ast.literal_eval(re.search(r"\{.*?\}", source, re.S).group())
    assert answers == dict.fromkeys(EXERCISES)


def test_it_holds_no_path_of_the_machine_it_ran_on():
    text = json.dumps(NOTEBOOK)
    assert not re.search(r"/(home|root|tmp|var|Users)/|[A-Z]:\\\\", text)
