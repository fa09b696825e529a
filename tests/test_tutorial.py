"""The saved tutorial is complete, executed, within its limits, and consistent with the modules."""
import ast
import base64
import builtins
import json
import re
from pathlib import Path

import pytest
import torch

import data
import dpo
import model
import train
from tests import exercises

PATH = Path(dpo.__file__).with_name("tutorial.ipynb")
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
NODES = [node for source in SOURCES for node in ast.walk(ast.parse(source))]
PART_II = next(i for i, (_, text) in enumerate(CELLS) if text.startswith("# Part II"))


def number_of_words(cells):
    return sum(len(text.split()) for kind, text in cells if kind == "markdown")


def pictures_of(cell):
    return [output["data"]["image/png"] for output in cell["outputs"]
            if "image/png" in output.get("data", {})]


def test_cells_were_executed_in_order_without_errors_and_warnings():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert not any(output.get("name") == "stderr" for output in cell["outputs"])


def test_the_notebook_and_its_first_part_are_within_their_limits():
    first = CELLS[:PART_II]
    assert len(CELLS) <= 130 and len(first) <= 76
    assert number_of_words(CELLS) <= 6600 and number_of_words(first) <= 3700
    assert sum(source.count("\n") + 1 for source in SOURCES) <= 900
    assert sum(len(pictures_of(cell)) for cell in CODE) <= 20 and PATH.stat().st_size < 2e6


def test_code_lines_have_at_most_100_columns():
    for source in SOURCES:
        for line in source.split("\n"):
            assert len(line) <= 100, line


def sentences_of(text):
    """The sentences of a Markdown cell, without code, display equations and tables."""
    ignored = r"```.*?```|\$\$.*?\$\$|^\|.*?$|^    .*?$"
    text = re.sub(ignored, "\n\n", text, flags=re.S | re.M)
    text = re.sub(r"\$[^$]*\$|`[^`]*`|\[([^\]]*)\]\([^)]*\)", "x", text)
    return re.split(r"(?<=[.!?:;])\s+|\n\s*\n|\n(?=[-\d#])", text)


def test_no_sentence_has_more_than_30_words():
    for kind, text in CELLS:
        if kind == "markdown":
            for sentence in sentences_of(text):
                assert len(sentence.split()) <= 30, sentence


def test_text_has_no_control_characters_and_no_placeholders():
    """Control characters are left over if a backslash of a formula is lost."""
    assert not any(re.search("[\x00-\x08\x0b-\x1f]|TODO", text) for _, text in CELLS)


def test_chapters_are_in_order():
    text = "\n".join(text for kind, text in CELLS if kind == "markdown")
    assert re.findall(r"^## (\w+)\. ", text, re.M) == [*"0123456789", *"ABCDEFG"]
    assert len(re.findall(r"^# ", text, re.M)) == 2


def test_part_one_ends_with_the_step_to_an_llm_and_a_recap_of_ten_lines():
    _, last = CELLS[PART_II - 1]
    assert last.index("## 9. From here to an LLM") < last.index("## Recap")
    recap = last[last.index("## Recap"):]
    assert len(re.findall(r"^\d+\. ", recap, re.M)) == 10
    assert all(name in recap for name in ("RLHF", "PPO", "DPO"))


@pytest.mark.parametrize("number", range(1, 8))
def test_an_equation_is_typeset_where_it_is_first_mentioned(number):
    first = next(text for kind, text in CELLS if kind == "markdown" and f"Eq. {number}" in text)
    assert "$$" in first


@pytest.mark.parametrize("library, simple", [("sequence_logps", "simple_logp"),
                                             ("dpo_loss", "simple_dpo_loss")])
def test_a_simple_version_precedes_the_library_function_and_they_are_compared(library, simple):
    defined = next(i for i, source in enumerate(SOURCES) if f"def {simple}(" in source)
    shown = next(i for i, source in enumerate(SOURCES) if f"show({library})" in source)
    assert defined < shown and simple in SOURCES[shown]
    assert "assert torch.allclose" in SOURCES[shown]
    function = next(node for node in NODES if isinstance(node, ast.FunctionDef)
                    and node.name == simple)
    assert function.end_lineno - function.lineno <= 6


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
    known = base | set(dir(builtins))
    for start, end in zip(starts, [*starts[1:], len(CELLS)]):
        sources = [text for kind, text in CELLS[start:end] if kind == "code"]
        bound, used = bound_and_used(sources)
        assert used <= bound | known, used - bound - known


@pytest.mark.parametrize("module", [data, dpo, train, exercises])
def test_names_taken_from_a_module_exist_and_are_not_defined_again(module):
    used = {alias.name for node in NODES if isinstance(node, ast.ImportFrom)
            and node.module == module.__name__ for alias in node.names}
    used |= {node.attr for node in NODES if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id == module.__name__}
    assert used and all(hasattr(module, name) for name in used), used
    own = {name for name, value in vars(module).items()
           if getattr(value, "__module__", "") == module.__name__}
    assert not own & {node.name for node in NODES
                      if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_one_loop_is_visible_and_all_other_training_uses_train_step():
    calls = [node.func.attr for node in NODES
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert calls.count("train_step") == 1 and calls.count("step") == 1


@pytest.mark.parametrize("name", ["frontier", "curves"])
def test_a_picture_of_the_readme_is_the_output_of_one_cell(name):
    [cell] = [cell for cell in CODE if name in cell["metadata"].get("tags", [])]
    stored = PATH.with_name(".github") / f"{name}.png"
    assert stored.read_bytes() in [base64.b64decode(picture) for picture in pictures_of(cell)]


def solutions():
    """{exercise: answer} from the folded cell at the end: a function of a code block, or the last
    number of the line."""
    _, text = CELLS[-1]
    functions = {"torch": torch}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, functions)
    found = {3: functions["my_loss"], 4: functions["my_mask"], 5: functions["my_slope"]}
    for number, line in re.findall(r"^(\d)\. (.*)$", text, re.M):
        if int(number) not in found:
            last = re.findall(r"[−-]?\d+(?:\.\d+)?", line)[-1]
            found[int(number)] = float(last.replace("−", "-"))
    return found


def test_every_exercise_is_followed_by_its_check_and_has_a_solution():
    numbers = []
    for (_, text), (kind, source) in zip(CELLS, CELLS[1:]):
        for number in re.findall(r"\*\*Exercise (\d)", text):
            assert kind == "code" and f"check({number}, None)" in source
            numbers.append(int(number))
    assert numbers == sorted(exercises.EXERCISES) == sorted(solutions())


@pytest.mark.parametrize("number", sorted(exercises.EXERCISES))
def test_the_check_of_an_exercise_distinguishes_right_wrong_and_unanswered(number, capsys):
    exercises.check(number, solutions()[number])
    exercises.check(number, None)
    exercises.check(number, -123.0)
    right, unanswered, wrong = capsys.readouterr().out.splitlines()
    assert right == f"exercise {number}: right"
    assert "replace None" in unanswered and "Hint: " in unanswered
    assert "not right" in wrong and "Hint: " in wrong


@pytest.mark.parametrize("number, answer", [
    (3, lambda pc, pr, rc, rr, beta: -torch.log(torch.sigmoid(beta * (pc - rc - pr + rr)))),
    (3, lambda pc, pr, rc, rr, beta: dpo.dpo_loss(pr, pc, rr, rc, beta)[0]),
    (4, lambda tokens, lengths: tokens != 0),
    (5, lambda pc, pr, rc, rr, beta: -beta * torch.sigmoid(-beta * (pc - rc - pr + rr)))],
    ids=["infinite loss", "chosen and rejected swapped", "mask from padding", "wrong sign"])
def test_a_typical_mistake_is_not_accepted(number, answer):
    assert "not right" in exercises.verdict(number, answer)


def test_no_path_of_a_machine_is_stored():
    paths = r"/(home|root|tmp|var|work|Users)/|[A-Z]:\\\\"
    assert not re.search(paths, json.dumps(NOTEBOOK))
