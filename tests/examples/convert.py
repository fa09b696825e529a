# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
r"""Convert a public preference file to the three strings per line that `train.py --data` reads.

    python -m tests.examples.convert records.jsonl pairs.jsonl
    python -m tests.examples.convert orca.jsonl pairs.jsonl --prompt question

You need it if your answers are whole dialogues (HH-RLHF) or lists of messages (UltraFeedback), or
if your keys have other names (Orca). The input is JSON lines or one JSON array, in UTF-8. Messages
become HH-RLHF's text: [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
is the prompt "\n\nHuman: 2+2?\n\nAssistant:" with the completion " 4", and a system message is a
turn "System:". White space around a turn is removed, an empty turn is left out, and turns that
prompt and answers share are written once. If all three are plain texts, they stay as they are. A
`system` text comes first in both cases. If a record does not give one prompt with two answers, it
is dropped, and the report counts the reasons. The exit code is 2 if no file was written.
"""
import argparse
import collections
import json
import re
import sys
from pathlib import Path

NAMES = ("prompt", "chosen", "rejected")
SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
TURN = re.compile(r"\n\n(Human|Assistant|System):")


def parse_json(text):
    """The value of a JSON text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: thousands of open brackets
        return None


def read_records(path):
    """[(place, record)], such as ("line 3", {...}). Raises OSError or ValueError."""
    text = path.read_text(encoding="utf-8-sig")
    array = parse_json(text)
    if isinstance(array, list):
        return [(f"record {i}", record) for i, record in enumerate(array, 1)]
    lines = enumerate(text.split("\n"), 1)  # splitlines would also split at U+2028 inside a text
    return [(f"line {i}", parse_json(line)) for i, line in lines if line.strip()]


def read_message(message):
    """One message as a turn (speaker, text). Raises ValueError."""
    if isinstance(message, dict) and message.get("tool_calls"):
        raise ValueError("messages with tool_calls")
    if not isinstance(message, dict) or not isinstance(message.get("content", ""), str):
        raise ValueError("content that is not text")
    if not message.keys() >= {"role", "content"}:
        raise ValueError(f"messages with {list(message)!s:.200} instead of role and content")
    if message["role"] not in list(SPEAKERS):  # a list, because a role may be any value
        raise ValueError(f"messages with the role {message['role']!r:.200}")
    return SPEAKERS[message["role"]], message["content"].strip()


def read_field(value):
    """A field as a plain text, or as turns [(speaker, text)] if it holds messages or a dialogue.
    A dialogue begins with a blank line and a turn, or with two turns. Raises ValueError."""
    if not isinstance(value, str):
        messages = value if isinstance(value, list) else [value]
        return [read_message(message) for message in messages]
    found = parse_json(value)
    if isinstance(found, list) and found and isinstance(found[0], dict):
        if found[0].keys() >= {"role", "content"} or found[0].keys() >= {"from", "value"}:
            return read_field(found)
    before, *parts = TURN.split("\n\n" + value.strip())  # parts: speaker, text, speaker, text, ...
    if before or not (TURN.match(value) or len(parts) >= 4):
        return value
    return [(parts[i], parts[i + 1].strip()) for i in range(0, len(parts), 2)]


def split_answer(answer):
    """The turns before the answer, and the answer. Raises ValueError if it is not at the end."""
    turns = [("Assistant", answer.strip())] if isinstance(answer, str) else answer
    if not turns or turns[-1][0] != "Assistant" or not turns[-1][1]:
        raise ValueError("no answer at the end")
    return turns[:-1], turns[-1][1]


def join_context(system, prompt, context):
    """The turns before an answer. The context, which is the turns in the answer's field, must hold
    the prompt or be its end, unless one of the two is empty. Raises ValueError."""
    prompt = [turn for turn in prompt if turn[1]]
    context = [turn for turn in context if turn[1]]
    if any(context[i:i + len(prompt)] == prompt for i in range(len(context))):
        turns = context
    elif not context or prompt[-len(context):] == context:
        turns = prompt
    else:
        raise ValueError("different contexts in prompt and answer")
    return turns if system in turns or not system[1] else [system, *turns]


def join_turns(system, prompt, answers):
    """[prompt, chosen, rejected] as HH-RLHF's text. Raises ValueError."""
    prompt = [("Human", prompt.strip())] if isinstance(prompt, str) else prompt
    (context, chosen), (other, rejected) = [split_answer(answer) for answer in answers]
    context = join_context(system, prompt, context)
    if context != join_context(system, prompt, other):
        raise ValueError("different contexts in chosen and rejected")
    if not context or context[-1][0] != "Human":
        raise ValueError("no question before the answer (see --prompt)")
    turns = [f"\n\n{speaker}: {text}" for speaker, text in context]
    return ["".join(turns) + "\n\nAssistant:", " " + chosen, " " + rejected]


def convert(record, keys):
    """One record as [prompt, chosen, rejected]. Raises ValueError with the reason to drop it."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    missing = [name for name in NAMES if keys[name] not in record and keys[name] != "prompt"]
    if missing:
        raise ValueError("no key for " + " and ".join(f"--{name}" for name in missing))
    system = read_message({"role": "system", "content": record.get("system") or ""})
    prompt = read_field(record.get(keys["prompt"]) or "")
    answers = [read_field(record.get(keys[name])) for name in ("chosen", "rejected")]
    if not all(isinstance(field, str) for field in [prompt, *answers]):
        return join_turns(system, prompt, answers)
    if not prompt.strip():
        raise ValueError("no prompt (see --prompt)")
    if not all(answer.strip() for answer in answers):
        raise ValueError("no answer at the end")
    if not prompt.lstrip().startswith(system[1]):
        prompt = system[1] + "\n\n" + prompt.lstrip()
    return [prompt, *answers]


def convert_all(records, keys):
    """Convert the records and print what is not used or dropped. Returns the pairs."""
    pairs, unused, dropped = [], collections.Counter(), collections.defaultdict(list)
    for place, record in records:
        try:
            pairs.append(dict(zip(NAMES, convert(record, keys), strict=True)))
            unused.update(record.keys() - {"system", *keys.values()})
        except ValueError as reason:
            dropped[str(reason)].append((place, record))
    counts = [f"{name!r} in {count:,}" for name, count in sorted(unused.items())]
    print("fields of the kept records that are not used:", ", ".join(counts) or "none")
    for reason, cases in dropped.items():
        places = ", ".join(place for place, _ in cases)
        print(f"dropped {len(cases):,}, {reason}: {places:.200}")
        if isinstance(cases[0][1], dict):
            print(f"  keys of the first: {list(cases[0][1])!s:.200}")
    counts = [f"{len(cases):,} {reason}" for reason, cases in dropped.items()]
    print("; ".join([f"kept {len(pairs):,}, dropped {len(records) - len(pairs):,}", *counts]))
    return pairs


def write(pairs, path):
    """Write the pairs as JSON lines. The file appears whole or not at all. Raises OSError."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", type=Path, help="JSON lines or a JSON array, in UTF-8")
    parser.add_argument("pairs", type=Path, help="the file to write, for train.py --data")
    for name in NAMES:
        parser.add_argument("--" + name, metavar="KEY", default=name, help="default: %(default)s")
    args = parser.parse_args(arguments)
    keys = {name: getattr(args, name) for name in NAMES}
    try:
        if args.pairs.exists() and (not args.pairs.is_file() or args.pairs.samefile(args.records)):
            raise ValueError(f"{args.pairs} is the input itself, or not a file")
        pairs = convert_all(read_records(args.records), keys)
        if not pairs:
            raise ValueError(f"no pair was kept, so {args.pairs} was not written")
        write(pairs, args.pairs)
    except (OSError, ValueError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a key may not fit the terminal's encoding
    main()
