"""What the README says and shows is so."""
import ast
import base64
import json
import os
import re
import shutil
import subprocess
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


TOKENIZER = data.toy_tokenizer()
PAIRS = [(*data.encode(TOKENIZER, x, y_w), data.encode(TOKENIZER, x, y_l)[1]) for x, y_w, y_l in [
    ("Last night we saw a thriller:", " tense superb", " dull"), ("At home I watched a comedy:", " funny", " slow slow slow")]]


def snippet(text):
    """The one python snippet that holds text."""
    [found] = [code for code in SNIPPETS if text in code]
    return found


def to_copy(code=snippet("def batch_of"), **given):
    """What the snippet to copy leaves behind, run with a policy of its own or with what is given."""
    torch.manual_seed(0)
    shown = {"policy": GPT(GPTConfig(TOKENIZER.n_vocab)), "pairs": PAIRS, **given}
    exec(code, shown)
    return shown


def starts_at_ln_2(shown):
    """The README's first check, first half: every row, not the mean."""
    return torch.allclose(shown["losses"], torch.tensor(0.6931), atol=1e-4)


def moves(shown, code=snippet("def batch_of")):
    """The first check, second half: after one update the loss is another."""
    torch.optim.SGD(shown["policy"].parameters(), 0.1).step()
    policy_logps = shown["pair_logps"](shown["policy"], shown["tokens"], shown["mask"])
    with torch.no_grad():
        ref_logps = shown["pair_logps"](shown["reference"], shown["tokens"], shown["mask"])
    return not torch.allclose(dpo.dpo_loss(*policy_logps, *ref_logps, 0.1)[0], torch.tensor(0.6931), atol=1e-4)


def test_the_snippet_to_copy_runs_and_passes_its_four_checks():
    shown = to_copy()
    tokens, mask, policy = shown["tokens"], shown["mask"], shown["policy"]
    assert shown["reference"] is not policy and policy.wte.weight.grad.abs().max() > 0 and shown["reference"].wte.weight.grad is None
    assert starts_at_ln_2(shown) and moves(shown)
    completions = [pair[k] for k in (1, 2) for pair in PAIRS]
    assert [tokens[i][mask[i]].tolist() for i in range(4)] == completions and completions[0][-1] == TOKENIZER.eot_token
    together = torch.cat(shown["pair_logps"](policy, tokens, mask))
    for i, row in enumerate(tokens):
        n = int(mask[i].nonzero().max()) + 1
        alone = dpo.sequence_logps(policy(row[None, :n]), row[None, :n], mask[i:i + 1, :n])
        labels = torch.where(mask[i], row, -100)[1:]
        hugging_face = F.cross_entropy(policy(row[None])[0, :-1], labels, ignore_index=-100)
        assert alone.item() == pytest.approx(together[i].item(), abs=1e-4) == pytest.approx(-hugging_face.item() * mask[i].sum().item(), abs=1e-4)


def replaced(old, new):
    code = snippet("def batch_of")
    assert code.count(old) >= 1
    return code.replace(old, new)


def test_the_first_check_shows_a_reference_that_is_the_policy_dropout_and_softmax():
    same = to_copy(replaced("copy.deepcopy(policy.eval()).requires_grad_(False)", "policy"))
    assert starts_at_ln_2(same) and not moves(same)
    class Dropout(GPT):
        def forward(self, tokens):
            return F.dropout(super().forward(tokens), 0.1)
    assert not starts_at_ln_2(to_copy(policy=Dropout(GPTConfig(TOKENIZER.n_vocab))))
    assert starts_at_ln_2(to_copy(replaced("sequence_logps(model(tokens),", "sequence_logps(model(tokens).softmax(-1),")))  # the fourth tells
    shown = to_copy(replaced("sequence_logps(model(tokens),", "sequence_logps(model(tokens).roll(1, 1),"))  # shifted twice
    row, mask = shown["tokens"][:1], shown["mask"][:1]
    hugging_face = F.cross_entropy(shown["policy"](row)[0, :-1], torch.where(mask, row, -100)[0, 1:], ignore_index=-100)
    assert abs(shown["pair_logps"](shown["policy"], row, mask)[0].item() + hugging_face.item() * mask.sum().item()) > 1e-3


def test_the_second_check_shows_an_eos_that_is_lost_or_a_prompt_that_is_scored():
    right = to_copy()
    eos = TOKENIZER.eot_token
    lost = to_copy(replaced("tokens, mask = batch_of(pairs, pad=0)", f"tokens, mask = batch_of(pairs, pad={eos}); mask &= tokens != {eos}"))
    assert all((lost["mask"][i].sum() == right["mask"][i].sum() - 1) for i in range(4)) and starts_at_ln_2(lost)
    prompt = to_copy(replaced("mask[i, len(x):", "mask[i, 1:"))
    assert starts_at_ln_2(prompt) and prompt["tokens"][0][prompt["mask"][0]].tolist() != PAIRS[0][1]


@pytest.mark.parametrize("old, new, message", [
    ("tokens, mask = batch_of(pairs, pad=0)", "tokens, mask = batch_of(pairs, pad=0); mask = ~mask", "expected mask False on each row's first token"),
    ("tokens, mask = batch_of(pairs, pad=0)", "tokens, mask = batch_of(pairs, pad=0); mask = tokens > 0", "expected mask False on each row's first token"),
    ("policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta", "ref_chosen_logps, ref_rejected_logps, policy_chosen_logps, policy_rejected_logps, beta", "without gradient"),
    ("policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta", "policy_chosen_logps, ref_chosen_logps, policy_rejected_logps, ref_rejected_logps, beta", "without gradient"),
    ("with torch.no_grad():", "reference.requires_grad_(True)\nif True:", "without gradient")],
    ids=["inverted mask", "attention mask", "swapped", "another order", "reference with gradient"])
def test_mistakes_that_are_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        to_copy(replaced(old, new))


def test_accumulated_parts_have_the_gradient_of_the_whole():
    """As the comment says: the sum over a part, divided by the pairs of all parts."""
    code = replaced("losses.mean().backward()", "(losses.sum() / 2).backward()")
    whole, parts = to_copy(), to_copy(code, pairs=PAIRS[:1])
    exec(code.replace("reference = copy", "unused = copy"), parts | {"pairs": PAIRS[1:]})
    gradients = [shown["policy"].wte.weight.grad for shown in (whole, parts)]
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3


def test_the_lines_that_use_a_trained_model_print_samples(small, tmp_path, monkeypatch, capsys):
    shutil.copytree(small[1], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    exec(snippet("model.sample("), {})
    lines = capsys.readouterr().out.splitlines()
    for line in lines:
        prompt, completion = re.fullmatch("(.*:)(.*)", line).groups()
        assert prompt in sum(data.prompts(), []) and data.reward(prompt, completion) > data.MALFORMED
    assert len(lines) == 2


def test_the_lines_that_export_a_model_make_a_folder_in_gpt2s_form(small, tmp_path, monkeypatch):
    """And where the transformers library is installed, it opens the folder and has our logits."""
    shutil.copytree(small[1], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    exec(snippet("to_gpt2()"), {})
    model, weights = GPT.load("out/dpo.pt"), torch.load("gpt2-dpo/pytorch_model.bin", weights_only=True)
    again = GPT.from_gpt2(weights, n_head=4)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    with open("gpt2-dpo/config.json") as file:
        assert json.load(file) == {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 299, "n_positions": 256, "n_embd": 64,
            "n_layer": 1, "n_head": 4, "bos_token_id": TOKENIZER.eot_token, "eos_token_id": TOKENIZER.eot_token}
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    theirs, tokens = transformers.GPT2LMHeadModel.from_pretrained("gpt2-dpo").eval(), torch.tensor([PAIRS[0][0]])
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4


HH = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2 + 2?\n\nAssistant: 5"},
      {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hello\n\nAssistant: B"}]
ASK = [{"role": "user", "content": "2 + 2?"}]
ULTRAFEEDBACK = [{"prompt": "2 + 2?", "chosen": [*ASK, {"role": "assistant", "content": "4"}], "rejected": [*ASK, {"role": "assistant", "content": "5"}]}] * 2


@pytest.mark.parametrize("text, records, pairs", [
    ('record["chosen"].rpartition', HH, [("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2 + 2?\n\nAssistant:", " 4", " 5")]),
    ("m['role']", ULTRAFEEDBACK, [("\n\nUser: 2 + 2?\n\nAssistant:", " 4", " 5")] * 2)], ids=["dialogues", "messages"])
def test_public_sets_become_a_file_of_pairs(text, records, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = snippet(text)
    exec(code, {"records": records})
    assert data.read_jsonl("pairs.jsonl") == pairs and code.count("\n") <= 8


def test_two_processes_get_the_weights_of_one(small, tmp_path, monkeypatch):
    """The lines for torchrun, on the CPU: the same weights to 1e-5 of the largest."""
    code = snippet("all_reduce")
    assert code.count("\n") <= 20
    shutil.copy(os.path.join(ROOT, "tests", "pairs.jsonl"), tmp_path / "pairs.jsonl")
    shutil.copytree(small[1], tmp_path / "out")
    (tmp_path / "several.py").write_text(code.replace("steps=100", "steps=4, device='cpu'"))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "several.py"],
                          env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                          cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    weights = [GPT.load(tmp_path / f"dpo{rank}.pt").state_dict() for rank in (0, 1)]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    exec((tmp_path / "several.py").read_text(), {})  # this process alone
    torch.distributed.destroy_process_group()
    weights.append(GPT.load(tmp_path / "dpo0.pt").state_dict())
    start = GPT.load(tmp_path / "out" / "sft.pt").state_dict()
    for name, p in weights[2].items():
        assert torch.equal(weights[0][name], weights[1][name]) and (p - weights[0][name]).abs().max() < 1e-5 * p.abs().max(), name
    assert not torch.equal(start["wte.weight"], weights[0]["wte.weight"])


def test_the_lines_that_plot_draw_the_margin_of_every_step(small, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    pyplot.switch_backend("agg")
    shutil.copytree(small[1], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    exec(snippet("plt.plot"), {})
    assert len(pyplot.gca().lines[0].get_xdata()) == 400


def test_the_picture_is_the_tutorials_own_output():
    with open(os.path.join(ROOT, "tutorial.ipynb"), encoding="utf-8") as file:
        outputs = [output for cell in json.load(file)["cells"] for output in cell.get("outputs", [])]
    pictures = [base64.b64decode(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    with open(os.path.join(ROOT, ".github", "frontier.png"), "rb") as file:
        assert file.read() in pictures


def test_it_is_short_and_its_contents_lead_somewhere():
    assert README.count("\n") <= 300
    headings = {re.sub("[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-") for line in README.splitlines() if line.startswith("## ")}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(links) > 5 and set(links) <= headings


def test_the_file_map_has_the_files_and_their_lines():
    rows = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert set(rows) == {"dpo.py", "model.py", "data.py", "train.py"}
    for name, lines in rows.items():
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            count = len(file.readlines())
        assert count == int(lines), f"{name}: the README says {lines} lines, it has {count}"


def test_every_flag_in_the_readme_exists():
    import train
    flags = set(re.findall(r"(?<!\w)--(\w+)", README))
    of_tests = set()
    for name in ("benchmark.py", "conftest.py"):
        with open(os.path.join(ROOT, "tests", name), encoding="utf-8") as file:
            of_tests |= set(re.findall(r'(?:add_argument|addoption)\("--(\w+)"', file.read()))
    assert flags and flags <= {f.name for f in train.fields(train.Config)} | of_tests | {"help", "nproc_per_node"}


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
