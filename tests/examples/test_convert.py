# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""convert.py: what becomes of each shape of record, what is dropped and why, and what is reported."""
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import data
from tests.conftest import ROOT
from tests.examples import convert


def message(role, text):
    return {"role": role, "content": text}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


HI, SUM = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: 2+2?\n\nAssistant:"
HI_SUM, BRIEF_SUM = HI + " A" + SUM, "\n\nSystem: Be brief." + SUM
ASK, HELLO, BRIEF = message("user", "2+2?"), message("user", "Hi"), message("system", "Be brief.")
FOUR, FIVE, HISTORY = message("assistant", "4"), message("assistant", "5"), [HELLO, message("assistant", "A")]
FROM = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]  # ShareGPT
TEXTS = pair("2+2?", " 4", " 5")
ANSWERS = {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]}
ALONE = {"chosen": [FOUR], "rejected": [FIVE]}
LONG = {"chosen": [*HISTORY, ASK, FOUR], "rejected": [*HISTORY, ASK, FIVE]}
WITH_SYSTEM = {"chosen": [BRIEF, ASK, FOUR], "rejected": [BRIEF, ASK, FIVE]}
HH = {"chosen": HI_SUM + " 4", "rejected": HI_SUM + " 5"}


@pytest.fixture
def run(tmp_path, capsys):
    """run(text or list of records, *flags) converts them: its code, lines of the report, err, pairs."""
    def run(content, *flags):
        source, target = tmp_path / "records.jsonl", tmp_path / "pairs.jsonl"
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        source.write_bytes(text.encode())
        code = 0
        try:
            convert.main([str(source), str(target), *flags])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        pairs = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else None
        return SimpleNamespace(code=code, lines=out.splitlines(), err=err, pairs=pairs)
    return run


SAME = [  # plain texts, which stay as they are
    TEXTS, pair("Write a line.\n", "One\n", "\nTwo "), pair("你好：", "很好", "不好"), pair("List it", '["a"]', '[{"role": 1}, 2'),
    pair("An object", '[{"role": "admin"}]', "[]"), pair("A scene", "A scene:" + HI + " A", "No"),
    pair("A PC", "System: Windows", "Human: none")]
FOUR_OR_FIVE = [  # (prompt that is written, record). The answers are 4 and 5.
    # Whole dialogues and messages
    (HI_SUM, HH), (HI, {"chosen": HI[2:] + " 4 ", "rejected": HI + "5\n"}), (HI, pair("\n\nHuman: Hi", "4", "\n\nAssistant: 5")),
    (BRIEF_SUM, {"chosen": BRIEF_SUM + " 4", "rejected": BRIEF_SUM + " 5"}), (HI, pair(HI, "4", " 5")),
    (SUM, ANSWERS), (HI_SUM, LONG), (BRIEF_SUM, WITH_SYSTEM), (BRIEF_SUM, {"prompt": [BRIEF, ASK], **ALONE}),
    (SUM, {"prompt": "2+2?", **ALONE}), (SUM, {"prompt": "2+2?", "chosen": FOUR, "rejected": FIVE}),
    (SUM, pair(ASK, FOUR, "5")), (HI_SUM, {"prompt": HI_SUM, **ALONE}),
    (SUM, {"chosen": [ASK | {"tool_calls": None}, FOUR | {"tool_calls": []}], "rejected": [ASK, FIVE]}),
    # Prompt and answers overlap. The first three cases occur in public files.
    (SUM, {"prompt": "2+2? ", **ANSWERS}), (BRIEF_SUM, {"prompt": [BRIEF, ASK], **ANSWERS}), (HI_SUM, {"prompt": "2+2?", **HH}),
    (HI_SUM, {"prompt": "Hi", **HH}), (HI_SUM, {"prompt": HI_SUM, **HH}), (HI_SUM, {"prompt": "Hi", **LONG}),
    (HI_SUM, {"prompt": "2+2?", **LONG}), (BRIEF_SUM, {"prompt": "2+2?", **WITH_SYSTEM}), (SUM, {"prompt": SUM, **ANSWERS}),
    (HI_SUM, {"prompt": [*HISTORY, ASK], **ANSWERS}), (SUM, pair("2+2?", [message("user", "\n2+2? "), FOUR], [FIVE])),
    *[(SUM, {"prompt": nothing, **ANSWERS}) for nothing in ("", " \n", None, [], [message("user", "")])],
    (SUM, {"chosen": [message("system", ""), ASK, FOUR], "rejected": [ASK, FIVE]}),
    (SUM, {"prompt": [ASK, message("assistant", " ")], **ALONE}),
    # A system text
    ("Be brief.\n\n2+2?", {"system": "Be brief.\n", **TEXTS, "prompt": "\n2+2?"}),
    ("Be brief. 2+2?", {"system": "Be brief.", **TEXTS, "prompt": "Be brief. 2+2?"}),
    (BRIEF_SUM, {"system": "Be brief.", **ANSWERS}), (BRIEF_SUM, {"system": "Be brief. ", **WITH_SYSTEM}),
    (BRIEF_SUM, {"system": "Be brief.", "prompt": [BRIEF, ASK], **ALONE}), (BRIEF_SUM, {"system": "Be brief.", **pair(SUM, "4", "5")}),
    ("\n\nSystem: Think." + HI_SUM, {"system": "Think.", **HH}), ("\n\nSystem: Think." + BRIEF_SUM, {"system": "Think.", **WITH_SYSTEM}),
    *[("2+2?", {"system": nothing, **TEXTS}) for nothing in ("", " ", None)],
    *[(SUM, {"system": nothing, **ANSWERS}) for nothing in ("", "\n", None)],
    # Strings that are JSON lists of messages
    (SUM, {"chosen": json.dumps([ASK, FOUR]), "rejected": json.dumps([ASK, FIVE], indent=2)}),
    (BRIEF_SUM, pair(json.dumps([BRIEF, ASK]), "4", "5"))]
KEPT = [(record, record) for record in SAME] + [(record, pair(prompt, " 4", " 5")) for prompt, record in FOUR_OR_FIVE]
KEPT.append(({"chosen": [HELLO, message("assistant", "\n Say:" + HI)], "rejected": HI + " A\n\n1. B"},
             pair(HI, " Say:" + HI, " A\n\n1. B")))  # only the first white space of an answer is changed


@pytest.mark.parametrize("record, expected", KEPT)
def test_each_shape_gives_one_prompt_and_two_answers(record, expected, run):
    result = run([record])
    assert result.pairs == [expected], result.lines
    assert result.code == 0 and result.err == "" and result.lines[-1] == "kept 1, dropped 0"


@pytest.mark.parametrize("prompt, record, flags, unused", [
    ("Think.\n\n2+2?", {"system": "Think.", "question": "2+2?", "chosen": " 4", "rejected": " 5"}, "--prompt question", "none"),
    ("2+2?", {"history": "2+2?", "A": " 4", "B": " 5"}, "--prompt history --chosen A --rejected B", "none"),
    (BRIEF_SUM, {"prompt": "not this", "messages": [BRIEF, ASK], **ALONE}, "--prompt messages", "'prompt' in 1")])
def test_flags_name_the_keys_and_each_of_these_keys_must_be_there(prompt, record, flags, unused, run):
    result = run([record], *flags.split())
    assert result.pairs == [pair(prompt, " 4", " 5")] and result.lines[0].endswith("are not used: " + unused)
    for name in convert.NAMES:
        assert run([record], *flags.split(), "--" + name, "qury").lines[-1] == f"kept 0, dropped 1; 1 no key for --{name}"


NOT_TEXT, NO_ANSWER, NO_PROMPT = "content that is not text", "no answer at the end", "no prompt (see --prompt)"
OTHER_PROMPT, OTHER_CONTEXT = "different contexts in prompt and answer", "different contexts in chosen and rejected"
NO_QUESTION, CALLS = "no question before the answer (see --prompt)", "messages with tool_calls"
NO_KEYS, OTHER_KEYS = "no key for --chosen and --rejected", "messages with ['from', 'value'] instead of role and content"
DROPPED = [
    (OTHER_CONTEXT, {"chosen": HI + " A", "rejected": SUM + " B"}), (OTHER_CONTEXT, {"chosen": HI + " A", "rejected": " B"}),
    (OTHER_CONTEXT, {"chosen": [ASK, FOUR], "rejected": [BRIEF, ASK, FIVE]}), (OTHER_PROMPT, {"prompt": "3+3?", **ANSWERS}),
    (OTHER_PROMPT, {"prompt": "Bye", **HH}), *[(OTHER_PROMPT, {"prompt": prompt, **ANSWERS}) for prompt in ("?", HISTORY)],
    (OTHER_PROMPT, {"prompt": [ASK, *HISTORY], **ANSWERS}), (OTHER_PROMPT, pair("2+2?", [ASK, FOUR], [HELLO, FIVE])),
    (NO_ANSWER, {"chosen": HI + " A\n\nHuman: Bye", "rejected": HI + " B"}), (NO_ANSWER, pair("2+2?", "4", " ")),
    (NO_ANSWER, {"chosen": HI + " A", "rejected": HI + " "}), (NO_ANSWER, pair("2+2?", [ASK, FOUR], [])),
    (NO_ANSWER, {"chosen": [ASK, FOUR, ASK], "rejected": [ASK, FIVE]}),
    (NO_ANSWER, {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE, message("assistant", " ")]}),
    *[(NOT_TEXT, pair("2+2?", [ASK, FOUR], [ASK, message("assistant", content)]))
      for content in (None, [{"type": "text", "text": "5"}], [{"type": "image_url"}], 5, {"text": "5"})],
    (NOT_TEXT, pair("2+2?", " 4", None)), (NOT_TEXT, pair("2+2?", 4, 5)), (NOT_TEXT, pair(7, [FOUR], [FIVE])),
    (NOT_TEXT, pair("2+2?", ["4"], ["5"])), (NOT_TEXT, {"system": ["Be brief."], **TEXTS}),
    (CALLS, pair("2+2?", {"role": "assistant", "tool_calls": [{"id": "1"}]}, FIVE)),
    (CALLS, pair("2+2?", [ASK, message("assistant", None) | {"tool_calls": [{"id": "1"}]}], [ASK, FIVE])),
    (OTHER_KEYS, pair("2+2?", FROM, FROM)), (OTHER_KEYS, {"conversations": FROM[:1], "chosen": FROM[1], "rejected": FROM[1]}),
    (OTHER_KEYS, pair(FROM[:1], " 4", " 5")), (OTHER_KEYS, pair("2+2?", json.dumps(FROM), " 5")),
    ("messages with ['text'] instead of role and content", pair("2+2?", {"text": "4"}, {"text": "5"})),
    ("messages with the role 'tool'", pair("2+2?", [ASK, message("tool", "4"), FOUR], [ASK, FIVE])),
    ("messages with the role ['user']", pair("2+2?", message(["user"], "4"), FIVE)),
    (NO_PROMPT, {"question": "2+2?", "chosen": " 4", "rejected": " 5"}), (NO_PROMPT, pair(" ", " 4", " 5")),
    (NO_PROMPT, {"system": "Be brief.", "chosen": " 4", "rejected": " 5"}),
    (NO_QUESTION, ALONE), (NO_QUESTION, pair([BRIEF], "4", "5")), (NO_QUESTION, pair(HISTORY, "4", "5")),
    (NO_KEYS, {"prompt": "2+2?", "answer": "4"}), ("no key for --rejected", {"prompt": "2+2?", "chosen": "4"})]


@pytest.mark.parametrize("reason, record", DROPPED)
def test_a_record_that_does_not_fit_is_dropped_with_its_reason_count_and_keys(reason, record, run):
    result = run([TEXTS, record, TEXTS, record | {"more": 1}])
    assert result.pairs == [TEXTS, TEXTS] and result.code == 0
    assert result.lines[1:] == [f"dropped 2, {reason}: line 2, line 4", f"  keys of the first: {list(record)}",
                                f"kept 2, dropped 2; 2 {reason}"]


def test_the_report_counts_unused_fields_of_kept_records_and_every_reason(run):
    first = {"id": 0, "history": [["a", "b"]], "context": "c", "images": ["a.png"], "system": "s", **TEXTS}
    wide = {f"key {i}": "x" for i in range(100)}
    result = run([first, {"id": 1, **ANSWERS}, {"prompt": "3+3?", **ANSWERS}] + [wide] * 2345)
    assert result.lines[0] == ("fields of the kept records that are not used: "
                               "'context' in 1, 'history' in 1, 'id' in 2, 'images' in 1")
    assert result.lines[-1] == f"kept 2, dropped 2,346; 1 {OTHER_PROMPT}; 2,345 {NO_KEYS}"
    assert f"dropped 2,345, {NO_KEYS}: line 4, line 5" in result.lines[3] and max(map(len, result.lines)) < 300


BOTH = [json.dumps(TEXTS), json.dumps(ANSWERS)]


@pytest.mark.parametrize("content", [
    "\n".join(BOTH), "\n\n \n" + "\n\t\n".join(BOTH) + "\n\n", "\r\n".join(BOTH) + "\r\n", "\ufeff" + "\n".join(BOTH),
    json.dumps([TEXTS, ANSWERS]), json.dumps([TEXTS, ANSWERS], indent=4) + "\n", "\ufeff\n" + json.dumps([TEXTS, ANSWERS])])
def test_lines_and_arrays_are_read_with_byte_order_mark_and_blank_lines(content, run):
    result = run(content)
    assert result.pairs == [TEXTS, pair(SUM, " 4", " 5")] and result.lines[1:] == ["kept 2, dropped 0"]


def test_line_separators_inside_a_text_do_not_split_a_record(run):
    record = pair("a\u2028b\x85c", " 4", " 5")
    assert run(json.dumps(record, ensure_ascii=False) + "\n" + BOTH[0]).pairs == [record, TEXTS]


@pytest.mark.parametrize("bad", ["garbage", BOTH[0][:-1], BOTH[0] + BOTH[1], "null", "[1]", "[" * 100_000])
def test_a_line_that_is_no_json_object_is_counted_with_its_number(bad, run):
    result = run("\n".join(["", BOTH[0], bad, "", bad, BOTH[1]]))
    assert len(result.pairs) == 2 and result.code == 0
    assert result.lines[1:] == ["dropped 2, not a JSON object: line 3, line 5", "kept 2, dropped 2; 2 not a JSON object"]
    assert run(json.dumps([TEXTS, [1], ANSWERS], indent=1)).lines[1] == "dropped 1, not a JSON object: record 2"


@pytest.mark.parametrize("content", ["", "[]", "garbage", json.dumps({"data": [TEXTS]}), json.dumps(pair("2+2?", 4, 5))])
@pytest.mark.parametrize("old", [None, ["of an earlier run"]])
def test_if_nothing_is_kept_the_code_is_2_and_no_file_is_written(content, old, run, tmp_path):
    if old:
        (tmp_path / "pairs.jsonl").write_text(json.dumps(old[0]))
    result = run(content)
    assert result.code == 2 and result.pairs == old and result.lines[-1].startswith("kept 0, dropped ")
    assert result.err == f"error: no pair was kept, so {tmp_path / 'pairs.jsonl'} was not written\n"
    assert {path.name for path in tmp_path.iterdir()} <= {"records.jsonl", "pairs.jsonl"}


@pytest.mark.parametrize("source, target", [
    ("records.jsonl", "records.jsonl"), ("records.jsonl", "link"), ("link", "records.jsonl"), ("records.jsonl", "."),
    ("missing", "new.jsonl"), ("utf16", "new.jsonl"), (".", "new.jsonl"), ("records.jsonl", "missing/new.jsonl")])
def test_the_same_file_twice_and_files_that_do_not_work_are_one_line_and_code_2(source, target, tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text(BOTH[0])
    (tmp_path / "utf16").write_bytes(BOTH[0].encode("utf-16"))
    (tmp_path / "link").symlink_to(tmp_path / "records.jsonl")
    with pytest.raises(SystemExit) as end:
        convert.main([str(tmp_path / source), str(tmp_path / target)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert ("is the input itself" in err) == (target in ("records.jsonl", "link", "."))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "records.jsonl", "utf16"]
    assert (tmp_path / "records.jsonl").read_text() == BOTH[0] and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_the_output_appears_whole_or_not_at_all(step, run, tmp_path, monkeypatch):
    def full_disk(path, *arguments, **settings):
        path.write_bytes(b"{")  # a part of the text, which must not be in pairs.jsonl
        raise OSError("No space left on device")

    (tmp_path / "pairs.jsonl").write_text('"old"')
    monkeypatch.setattr(convert.Path, step, full_disk)
    result = run(BOTH[0])
    assert result.code == 2 and result.err == "error: No space left on device\n"
    assert result.pairs == ["old"] and len(list(tmp_path.iterdir())) == 2


def test_train_reads_every_converted_pair(run, tmp_path):
    result = run([record for record, _ in KEPT] + [pair("\ud83d", "é\u2028", "\x00")])
    assert len(result.pairs) == len(KEPT) + 1 and list(data.read_jsonl(tmp_path / "pairs.jsonl")) == result.pairs


def test_every_record_is_kept_or_dropped_for_a_reason_of_this_file(run):
    """Every combination of 16 values in three fields and 4 in the fourth. Most of them do not fit."""
    values = [None, "", "x", HI, HI + " A", 3, True, [], {}, [None], [[]], ["x"], [ASK], [FOUR], [ASK, FOUR], json.dumps([FIVE])]
    records = [pair(*row[:3]) | {"system": row[3]} for row in itertools.product(values, values, values, (None, "s", 3, [BRIEF]))]
    result = run(records)
    first, *counts = result.lines[-1].replace(",", "").split("; ")
    assert first == f"kept {len(result.pairs)} dropped {len(records) - len(result.pairs)}" and len(result.pairs) > 0
    assert sum(int(count.split()[0]) for count in counts) == len(records) - len(result.pairs)
    named = {reason for reason, _ in DROPPED} | {"messages with [] instead of role and content"}
    assert {count.split(" ", 1)[1] for count in counts} <= named, "a programming error became a reason"


def test_the_documented_command_and_example_are_what_the_script_does(tmp_path):
    assert "python -m tests.examples.convert orca.jsonl pairs.jsonl --prompt question" in convert.__doc__
    example = json.dumps([ASK, FOUR]) + r' is the prompt "\n\nHuman: 2+2?\n\nAssistant:" with the completion " 4"'
    assert example in " ".join(convert.__doc__.split())
    names = {"ключ": 1, "\ud83d": 1}  # they do not fit the terminal's encoding
    (tmp_path / "orca.jsonl").write_text(json.dumps({"question": "2+2?", "chosen": " 4", "rejected": " 5"} | names))
    command = [sys.executable, "-m", "tests.examples.convert", tmp_path / "orca.jsonl", tmp_path / "pairs.jsonl"]
    done = subprocess.run([*command, "--prompt", "question"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == "" and done.stdout.splitlines()[-1] == "kept 1, dropped 0"
    assert json.loads((tmp_path / "pairs.jsonl").read_text()) == TEXTS
