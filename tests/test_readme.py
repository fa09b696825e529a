"""The README's code runs as printed, and what the README says about files, flags and figures is true."""
import ast
import copy
import importlib
import json
import math
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import data
import dpo
import train
from model import GPT, GPTConfig
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
PROSE = re.sub(r"^```.*?^```|<details>.*</details>", "", README, flags=re.S | re.M)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.replace("\\\n", "").splitlines()]
TOKENIZER = data.toy_tokenizer()
EOS = TOKENIZER.eot_token


def snippet(text, among=[block for language, block in BLOCKS if language == "python"]):
    """The one piece of code that contains text: a block, or among those within sentences."""
    [found] = [code for code in among if text in code]
    return found


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.S | re.M)[1]


def test_the_page_is_within_its_limits():
    lines = [line for _, block in BLOCKS for line in block.splitlines()]
    assert len(PROSE.split()) <= 2250 and len(lines) <= 70 and max(map(len, lines)) <= 88


def test_every_link_anchor_and_picture_exists():
    anchors = {"#" + re.sub("[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in re.findall("^## (.*)", README, re.M)}
    for link in re.findall(r"\]\(([^)]+)\)", README) + re.findall('src="([^"]+)"', README):
        assert link.startswith("https://") or link in anchors or (ROOT / link).exists(), link


def test_every_file_named_under_files_is_linked_under_its_own_name():
    links = dict(re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", section("Files")))
    unlinked = re.sub(r"\[[^]]+\]\([^)]+\)|`jupyter notebook tutorial.ipynb`", "", section("Files"))
    assert not re.search(r"\w\.(py|ipynb|md|jsonl)\b", unlinked)
    assert all(target.rstrip("/").endswith(name.rstrip("/")) for name, target in links.items())
    assert {path.name for path in ROOT.glob("*.py")} <= set(links) and (ROOT / "tutorial.ipynb").name in links
    assert all(path.name in links for path in (ROOT / "tests" / "examples").glob("[a-z]*.py") if not path.name.startswith("test_"))


@pytest.mark.parametrize("name", [".github/frontier.png", ".github/curves.png"])
def test_a_picture_follows_the_commands(name):
    """tests/test_tutorial.py compares it with the output of its cell."""
    assert README.index("python train.py --device cpu\n```") < README.index(f'<img src="{name}"') and README.count("<img") == 2


def test_the_faq_answers_each_question_on_one_line():
    questions = re.findall(r"^- \*\*(.*\?)\*\* .*\.$", section("FAQ"), re.M)
    expected = ["stay at 0.693", "chosen answers fall", "`rewards/chosen` negative", "loss 0 and the accuracy 1", "gibberish", "NaN",
                "Which β", "memory", "Sum or mean", "LoRA", "SFT", "When do I stop"]
    assert section("FAQ").strip().count("\n") + 1 == len(questions) == len(expected)
    assert all(words in question for words, question in zip(expected, questions, strict=True))


def test_the_numbers_and_the_steps_on_the_page_are_those_of_the_code():
    of_dpo, total = re.search(r"about (\d+) of ([\d,]+) lines", README).groups()
    lines = {path.name: path.read_text(encoding="utf-8").count("\n") for path in ROOT.glob("*.py")}
    assert (lines["dpo.py"], sum(lines.values())) == pytest.approx((int(of_dpo), int(total.replace(",", ""))), rel=0.05)
    training, held_out = data.toy_prompts()
    assert f"{len(data.REVIEWS):,} answers per prompt" in README and f"each of {len(training)} prompts" in README
    assert f"about {round(train.Config.n_pairs / len(training), -1):.0f} pairs" in README and f"on {len(held_out)} held-out prompts" in README
    thriller, review = re.search('"(Last night.*?:)".*?" ([a-z ]*)"', section("How it works")).groups()
    assert data.reward(thriller, " " + review) == 6 and "2 + 2 + 2 = 6" in README
    steps = re.findall(r"^(\d\.) \*\*(\w+)", section("How it works"), re.M)
    comments = re.findall(r"^    # (\d\..*)", (ROOT / "train.py").read_text(encoding="utf-8"), re.M)
    assert all(re.match(f"{number}.*{name}", line, re.I) for (number, name), line in zip(steps, comments, strict=True)) and len(steps) == 5


def test_five_defaults_change_with_init_as_stated():
    new, given = train.Config(), train.Config(init="x")
    changed = {f.name for f in train.fields(train.Config) if getattr(new, f.name) != getattr(given, f.name)}
    assert changed == {"init", "sft_learning_rate", "learning_rate", "beta", "block_size", "tokenizer", "n_layer", "n_head", "n_embd"}
    stated = re.findall(r"(\w+) (?:learning rate )?is (\S+) instead of ([\w.-]+\b)", section("GPT-2"))
    assert [(name, float(a), float(b)) for name, a, b in stated] == [
        ("SFT", given.sft_learning_rate, new.sft_learning_rate), ("DPO", given.learning_rate, new.learning_rate), ("β", given.beta, new.beta)]


def test_the_excerpt_has_the_reports_own_lines_with_fewer_digits(small):
    *rows, sentence = next(block for language, block in BLOCKS if not language).splitlines()
    printed = {line[:28].rstrip(): line[28:].split() for line in small[0].stdout.splitlines()}
    shown = {row[:28].rstrip(): row[28:].split() for row in rows}
    assert [len(printed[label]) for label in shown] == [len(values) for values in shown.values()] == [3] * 4
    assert re.sub(r"[\d.]+", "#", sentence) in re.sub(r"[\d.]+", "#", small[0].stdout)
    for objective, mean_reward, kl in [map(float, column[1:]) for column in zip(*shown.values())]:
        assert objective == pytest.approx(mean_reward - kl, abs=0.011)


def test_commands_can_be_pasted_into_any_shell():
    assert COMMANDS[:4] == ["python3 -m venv .venv", "source .venv/bin/activate", "pip install -r requirements.txt", "python train.py --device cpu"]
    assert not any(re.search(r"[#&;|!$*?~^=\[\](){}<>'\"\\]", command) for command in COMMANDS)
    assert re.search("^python -m pytest.*", README, re.M).group() == "python -m pytest"  # .ci/run looks for it


def test_commands_name_files_and_flags_that_exist():
    commands = COMMANDS + [code for code in INLINE if code.startswith("python ") and "--help" not in code]
    for command in commands:
        if command.startswith("python train.py"):
            train.parse_settings(command.split()[2:])
        for name in re.findall(r" -m (tests[\w.]+)", command):
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), command
    assert sum(command.startswith("python train.py --data") for command in commands) == 2
    [several] = [command for command in COMMANDS if command.startswith("torchrun")]
    assert set(re.findall("--([a-z]+) ", several)) <= set(importlib.import_module("tests.examples.torchrun").FLAGS)
    known = {f.name for f in train.fields(train.Config)} | set(importlib.import_module("tests.examples.convert").NAMES)
    assert set(re.findall(r"(?<![\w-])--(\w+)", README)) <= known | {"help", "nproc_per_node"}


def test_the_pair_on_the_page_is_one_that_train_reads(tmp_path):
    [line] = [block for language, block in BLOCKS if language == "json"]
    (tmp_path / "pairs.jsonl").write_text(line)
    assert [list(record) for record in data.read_jsonl(tmp_path / "pairs.jsonl")] == [list(data.KEYS)]


def test_parquet_and_csv_become_records(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    monkeypatch.chdir(tmp_path)
    parquet, messages = snippet("read_parquet", INLINE), {"chosen": [{"role": "assistant", "content": "4"}]}
    csv, texts = snippet("read_csv", INLINE) + parquet[parquet.index(".to_json"):], {"prompt": "2 + 2?", "chosen": "4", "rejected": "None"}
    pandas.DataFrame([messages]).to_parquet("a.parquet")
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n2 + 2?,4,None\n")
    for code, record in ((parquet, messages), (csv, texts)):
        eval(code)
        assert json.loads((tmp_path / "records.jsonl").read_text()) == record


def test_the_five_lines_of_the_loss_equal_dpo_loss():
    names = "policy_chosen_logps policy_rejected_logps ref_chosen_logps ref_rejected_logps".split()
    logps = dict(zip(names, torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), strict=True))
    logps["policy_chosen_logps"].requires_grad_(True)
    shown = {"F": F, "beta": 0.7, **logps}
    exec(snippet("F.logsigmoid"), shown)
    assert snippet("F.logsigmoid").count("\n") == 5 and torch.equal(shown["losses"], dpo.dpo_loss(**logps, beta=0.7)[0])
    assert logps["policy_chosen_logps"].grad.abs().min() > 0


class Stub(GPT):
    def forward(self, tokens):  # as models of the transformers library return logits
        return types.SimpleNamespace(logits=super().forward(tokens))


def logp(model, row):
    """log π(y|x) of a row alone, without padding, token by token."""
    ids = torch.tensor([row.prompt + row.completion])
    scored = range(len(row.prompt), ids.shape[1])
    return sum(model(ids).logits[0, t - 1].log_softmax(-1)[ids[0, t]].item() for t in scored)


@pytest.mark.parametrize("kind", ["stub", "transformers"])
def test_the_nine_lines_train_a_policy_and_pass_the_checks(kind):
    torch.manual_seed(0)
    code, policy = snippet("sequence_logps("), Stub(GPTConfig(EOS + 1))
    if kind == "transformers":
        library = pytest.importorskip("transformers", reason="the transformers library is not installed")
        policy = library.GPT2LMHeadModel(library.GPT2Config(vocab_size=EOS + 1, n_positions=64, n_embd=64, n_layer=1, n_head=4)).eval()
    answers = [" superb", " slow dull", " awful", " dull"]
    rows = [data.encode(TOKENIZER, prompt, answer) for prompt, answer in zip(["A comedy:", "On Friday"] * 2, answers, strict=True)]
    tokens, mask = data.collate(rows)
    shown = {"policy": policy, "reference": copy.deepcopy(policy), "tokens": tokens, "mask": mask}
    optimizer, seen = torch.optim.AdamW(policy.parameters(), lr=1e-3), []
    for _ in range(3):
        h = [logp(policy, row) - logp(shown["reference"], row) for row in rows]
        exec(code, shown)
        seen.append(shown["losses"].tolist())
        assert seen[-1] == pytest.approx([math.log1p(math.exp(-0.1 * (h[i] - h[i + 2]))) for i in range(2)], abs=1e-5)
        optimizer.step()
    assert len(code.splitlines()) == 9 and seen[0] == pytest.approx([0.6931] * 2, abs=1e-4) and max(seen[-1]) < 0.693
    assert all(p.grad is None for p in shown["reference"].parameters())
    assert [TOKENIZER.decode(tokens[i][mask[i]].tolist()) for i in range(4)] == [answer + "<|endoftext|>" for answer in answers]
    if kind == "transformers":  # the logits of the scored tokens alone
        assert torch.allclose(eval(snippet("policy.lm_head(", INLINE), shown), policy(tokens).logits[:, :-1][mask[:, 1:]], atol=1e-5)


def test_the_lines_that_use_a_trained_model_print_a_review(small, monkeypatch, capsys):
    monkeypatch.chdir(small[1].parent)
    exec(snippet("model.sample("), {})
    assert data.reward("Last night we saw a thriller:", capsys.readouterr().out.rstrip("\n")) > data.MALFORMED


def test_the_export_opens_here_and_in_the_transformers_library(small, monkeypatch):
    monkeypatch.chdir(small[1].parent)
    exec(snippet("to_gpt2()"), {})
    model, again = GPT.load("out/dpo.pt"), GPT.load("export/pytorch_model.bin")  # the latter reads n_head from config.json
    assert again.config.n_head == 4 and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    theirs, tokens = transformers.GPT2LMHeadModel.from_pretrained("export").eval(), torch.tensor([TOKENIZER.encode_ordinary("Last night")])
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4 and theirs.config.eos_token_id == EOS


def test_the_line_for_safetensors_keeps_every_weight(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    weights = GPT(GPTConfig(50, 16, 1, 2, 32)).to_gpt2()
    safetensors.save_file(weights, "gpt2/model.safetensors")
    exec(snippet("load_file", INLINE), {"torch": torch, "safetensors": sys.modules["safetensors"]})
    again = torch.load("gpt2/pytorch_model.bin", weights_only=True)
    assert all(torch.equal(again[name], weights[name]) for name in again | weights)


def test_requirements_and_imports_are_those_of_the_design():
    assert (ROOT / "requirements.txt").read_text().split() == ["torch>=2.6", "numpy", "tiktoken", "pytest"]
    allowed = {"dpo": "torch", "model": "torch", "data": "torch numpy tiktoken", "train": "torch numpy data dpo model"}
    for name, packages in allowed.items():
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names) == set(packages.split()), name
