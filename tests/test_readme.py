"""The README's code runs as printed, and what the README says about it is true."""
import ast
import base64
import copy
import json
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
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
PAIRS = ROOT / "tests" / "pairs.jsonl"
TOKENIZER = data.toy_tokenizer()
BOS, EOS = TOKENIZER.n_vocab, TOKENIZER.eot_token


def snippet(text, among=[block for language, block in BLOCKS if language == "python"]):
    """The one piece of code that contains text: a block, or among those within sentences."""
    [found] = [code for code in among if text in code]
    return found


def inline(text):
    return snippet(text, re.findall(r"`([^`\n]+)`", README))


def test_the_five_lines_of_the_loss_equal_dpo_loss():
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    logps = dict(zip(names, torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), strict=True))
    logps["policy_chosen_logps"].requires_grad_(True)
    shown = {"F": F, "beta": 0.7, **logps}
    exec(snippet("F.logsigmoid"), shown)
    assert torch.equal(shown["losses"], dpo.dpo_loss(**logps, beta=0.7)[0]) and logps["policy_chosen_logps"].grad.abs().min() > 0


def test_the_lines_that_use_a_trained_model_print_a_review(small, monkeypatch, capsys):
    monkeypatch.chdir(small[1].parent)
    exec(snippet("model.sample("), {})
    assert data.reward("Last night we saw a thriller:", capsys.readouterr().out.rstrip("\n")) > data.MALFORMED


class Stub(GPT):
    """A model with dropout whose call returns an object with logits, as in the transformers library."""

    def forward(self, tokens):
        return types.SimpleNamespace(logits=F.dropout(super().forward(tokens), 0.1, self.training))


def tokenize(text, add_special_tokens=True):
    return types.SimpleNamespace(input_ids=[BOS] * add_special_tokens + TOKENIZER.encode_ordinary(text))


@pytest.mark.parametrize("kind", ["stub", "transformers"])
def test_the_hugging_face_loop_passes_the_three_checks(kind, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    library, model = types.ModuleType("transformers"), Stub(GPTConfig(BOS + 1))
    if kind == "transformers":
        real = pytest.importorskip("transformers", reason="the transformers library is not installed")
        model = real.GPT2LMHeadModel(real.GPT2Config(vocab_size=BOS + 1, n_positions=256, n_embd=64, n_layer=1, n_head=4)).train()
    initial = copy.deepcopy(model).eval()
    library.AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=lambda name: model)
    library.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda name: tokenize)
    monkeypatch.setattr(tokenize, "eos_token_id", EOS, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(PAIRS.read_text(encoding="utf-8").splitlines(True)[:10]))
    shown = {}
    exec(snippet("AutoModelForCausalLM"), shown)
    assert re.fullmatch(r"loss 0\.6931, margin 0\.0000\nloss \S+, margin \S+\n", capsys.readouterr().out)

    pairs, reference = shown["batches"][0], torch.cat(shown["reference"][0])  # 1: the loss
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), initial.parameters(), strict=True))
    shown["policy"] = initial  # the loop's functions score with it
    assert torch.allclose(torch.cat(shown["logps"](pairs)), reference) and not reference.requires_grad
    shown["policy"] = model
    for _ in range(20):
        losses = dpo.dpo_loss(*shown["logps"](pairs), *reference.chunk(2), shown["beta"])[0]
        losses.mean().backward()
        shown["optimizer"].step()
    assert losses.mean() < 0.69314

    tokens, mask = shown["collate"](pairs)  # 2: the scored tokens
    completions = [pair[key] + "<|endoftext|>" for key in ("chosen", "rejected") for pair in pairs]
    assert [TOKENIZER.decode(row[scored].tolist()) for row, scored in zip(tokens, mask, strict=True)] == completions
    assert (tokens[:, 0] == BOS).all() and (tokens == BOS).sum() == (tokens == EOS).sum() == len(tokens)

    logps = torch.cat(shown["logps"](pairs))  # 3: a row alone, and the loss of the transformers library
    for row, scored, logp in zip(tokens, mask, logps, strict=True):
        row, labels = (part[:scored.nonzero().max() + 1] for part in (row, torch.where(scored, row, -100)))  # without padding
        mean = F.cross_entropy(model(row[None]).logits[0, :-1], labels[1:]) if kind == "stub" else model(row[None], labels=labels[None]).loss
        assert logp.item() == pytest.approx(-mean.item() * scored.sum().item(), abs=1e-3)
    if kind == "transformers":
        selected = eval(inline("policy.lm_head("), {**shown, "tokens": tokens, "mask": mask})
        assert torch.allclose(dpo.sequence_logps(selected, tokens, mask), logps, atol=1e-3)


def test_encoder_decoder_logits_need_a_position_at_their_end():
    """In such models the logits at position t predict token t. A position at their start shifts them."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    right = [sum(logits[i, t].log_softmax(-1)[tokens[i, t]].item() for t in range(4) if mask[i, t]) for i in range(2)]
    names = {"F": F, "sequence_logps": dpo.sequence_logps, "logits": logits, "tokens": tokens, "mask": mask}
    assert eval(inline("F.pad(logits"), names).tolist() == pytest.approx(right, abs=1e-5)
    wrong = eval(inline("F.pad(logits").replace("(0, 0, 0, 1)", "(0, 0, 1, 0)"), names)
    assert (wrong - torch.tensor(right)).abs().min() > 0.1


HI, PROMPT = "\n\nHuman: Hi\n\nAssistant:", "\n\nUser: 2 + 2?\n\nAssistant:"
ASK, SAY, MORE = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "4, yes"}
FITTING = [  # prompt, chosen and rejected of a record, then of the pair. " 4" is a prefix of " 4, yes".
    (None, HI + " A", HI + " A b", HI, " A", " A b"), (None, HI + " A" + HI + " B", HI + " A" + HI + " C", HI + " A" + HI, " B", " C"),
    (None, [ASK, SAY], [ASK, MORE], PROMPT, " 4", " 4, yes"), ("2 + 2?", [ASK, MORE], [ASK, SAY], PROMPT, " 4, yes", " 4"),
    ("2 + 2?", [SAY], [MORE], PROMPT, " 4", " 4, yes"), ([ASK], [SAY], [MORE], PROMPT, " 4", " 4, yes"),
    ([ASK], [ASK, SAY], [ASK, MORE], PROMPT, " 4", " 4, yes"), ("x", " y", " z", "x", " y", " z")]
NOT_FITTING = [
    (None, HI + " A", HI.replace("Hi", "Hello") + " B"), (None, [ASK, SAY], [ASK | {"content": "3 + 3?"}, MORE]),  # two contexts
    (None, HI + " A\n\nHuman: Bye", HI + " B"), (None, [ASK, ASK], [ASK, ASK | {"content": "5?"}]),  # the last turn is the user's
    (None, HI + " A", HI + " "), (None, " A", " B"), (None, HI[11:] + " A", HI[11:] + " B"), (None, [SAY], [MORE]),  # no answer or context
    (None, HI + " A", None), (None, [ASK, SAY], []), (None, ["4"], ["5"]), (7, [SAY], [MORE]), ([ASK], "4", "5"),
    *[(None, [ASK, SAY], [ASK, SAY | {"content": content}]) for content in (None, " ", 4, [{"type": "text", "text": "5"}])],
    *[(None, [ASK | {"content": content}, SAY], [ASK | {"content": content}, MORE]) for content in (None, 4, [{"type": "text", "text": "5"}])]]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_the_converter_keeps_pairs_with_one_context_and_counts_the_others(form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = [dict(zip(data.KEYS, row)) for row in FITTING + NOT_FITTING] + [{"question": "x"}, [1], None]
    code, text = snippet("def as_messages"), "\n\n".join(map(json.dumps, records))
    if form == "array":
        [(lines, array)] = re.findall(r"for record in (.*):  # array: (.*)", code)
        code, text = code.replace(lines, array), json.dumps(records, indent=1)
    (tmp_path / "records.jsonl").write_text(text)
    exec(code, {})
    assert [list(record.values()) for record in data.read_jsonl("pairs.jsonl")] == [pair for _, _, _, *pair in FITTING]
    assert capsys.readouterr().out == f"{ {'kept': len(FITTING), 'dropped': len(NOT_FITTING) + 3} }\n"


def test_the_export_opens_here_and_in_the_transformers_library(small, monkeypatch):
    monkeypatch.chdir(small[1].parent)
    exec(snippet("to_gpt2()"), {})
    model, again = GPT.load("out/dpo.pt"), GPT.load("export/pytorch_model.bin")  # the latter reads n_head from config.json
    assert again.config.n_head == 4 and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    theirs, tokens = transformers.GPT2LMHeadModel.from_pretrained("export").eval(), torch.tensor([TOKENIZER.encode_ordinary("Last night")])
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4 and theirs.config.eos_token_id == EOS


def test_two_lines_convert_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    weights = GPT(GPTConfig(50, 16, 1, 2, 32)).to_gpt2()
    safetensors.save_file(weights, "gpt2/model.safetensors")
    exec(snippet("load_file"), {})
    (tmp_path / "gpt2" / "config.json").write_text('{"n_head": 2}')
    again = GPT.load("gpt2/pytorch_model.bin").to_gpt2()
    assert all(torch.equal(again[name], weights[name]) for name in again | weights)


def test_the_picture_is_the_tutorials_own_output():
    cells = json.loads((ROOT / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output["data"]["image/png"] for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert (ROOT / ".github" / "frontier.png").read_bytes() in [base64.b64decode(output) for output in outputs], "no output is the picture"


def test_length_width_and_number_of_lines_are_as_stated():
    assert README.count("\n") <= 230 and max(len(line) for _, block in BLOCKS for line in block.splitlines()) <= 100
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in ROOT.glob("*.py"))
    assert lines == pytest.approx(int(re.search(r"about ([\d,]+) lines", README)[1].replace(",", "")), rel=0.05)
    assert snippet("AutoModelForCausalLM").count("\n") <= 45


def test_every_link_leads_somewhere():
    headings = {re.sub("[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-") for line in README.splitlines() if line.startswith("## ")}
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall('src="([^"]+)"', README)
    for link in links:
        assert link.startswith("https://") or link.startswith("#") and link[1:] in headings or (ROOT / link).is_file(), link
    assert set(re.findall(r"^\| `(\w+\.py)`", README, re.M)) == {path.name for path in ROOT.glob("*.py")}


def test_commands_work_in_any_shell_and_their_flags_exist():
    assert re.search("^python -m pytest.*", README, re.M).group() == "python -m pytest" in COMMANDS
    assert not any(re.search(r"[#&;|!$*'\"\\]", command) for command in COMMANDS)
    for command in COMMANDS:
        if command.startswith("python train.py"):
            train.parse_settings(command.split()[2:])
    assert set(re.findall(r"(?<!\w)--(\w+)", README)) <= {f.name for f in train.fields(train.Config)} | {"help"}


def test_the_excerpt_has_the_reports_own_lines(small):
    [excerpt] = [block for language, block in BLOCKS if not language]
    labels = [line for line in re.sub(r"  .*", "", excerpt, flags=re.M).splitlines() if line]
    assert len(labels) == 7 and all(f"\n{label}" in small[0].stdout for label in labels)


def test_requirements_and_imports_are_those_of_the_design():
    assert (ROOT / "requirements.txt").read_text().split() == ["torch>=2.6", "numpy", "tiktoken", "pytest"]
    allowed = {"dpo": "torch", "model": "torch", "data": "torch numpy tiktoken", "train": "torch numpy data dpo model"}
    for name, packages in allowed.items():
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names) == set(packages.split()), name
