# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""hugging_face.py with a stub of the transformers library, and with the library itself where it is installed."""
import json
import random
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dpo

SCRIPT = Path(__file__).with_name("hugging_face.py")
SOURCE = SCRIPT.read_text(encoding="utf-8")
PAIRS = [json.loads(line) for line in SCRIPT.parent.with_name("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
CONTEXT = 160  # of each model here, in tokens, and almost all tokens are bytes
MARKERS = {"gpt2": ("<|endoftext|>", "<|endoftext|>"), "llama2": ("<s>", "</s>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>")}


class Stub:
    """What the script uses of the classes in transformers."""
    @classmethod
    def from_pretrained(cls, name):
        if name == "./missing":
            raise OSError("no model\nhas this name")
        return torch.load(Path(name, cls.__name__), weights_only=False) if Path(name, cls.__name__).exists() else cls()

    def save_pretrained(self, folder):
        torch.save(self, folder / type(self).__name__)


class StubTokenizer(Stub):
    eos_token_id = 257

    def __call__(self, text, add_special_tokens, split_special_tokens):
        return types.SimpleNamespace(input_ids=[256] * add_special_tokens + list(text.encode()))


class StubModel(Stub, torch.nn.Module):
    """A causal model with dropout, and with weights in bfloat16, as many checkpoints have them."""
    config, device = types.SimpleNamespace(max_position_embeddings=CONTEXT), "cpu"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(258, 8).bfloat16(), torch.nn.Linear(8, 258).bfloat16()

    def forward(self, tokens):
        h = F.dropout(self.embedding(tokens).cumsum(1).tanh(), 0.1, self.training)
        return types.SimpleNamespace(logits=self.head(h))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of small random models with their tokenizers. That of llama2 puts a space before each text."""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    from tokenizers import Tokenizer, models, normalizers, processors
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for kind, (bos, eos) in MARKERS.items():
        pieces = [bos, eos, "▁", "▁E", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        backend = Tokenizer(models.BPE(vocabulary, [("▁", "E")], byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁" if kind == "llama2" else ""), normalizers.Replace(" ", "▁")])
        backend.post_processor = processors.TemplateProcessing("$A" if kind == "gpt2" else f"{bos} $A", special_tokens=[(bos, 0)])
        config = transformers.AutoConfig.for_model(
            "gpt2" if kind == "gpt2" else "llama", vocab_size=len(vocabulary), max_position_embeddings=CONTEXT,
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(root / kind)
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos).save_pretrained(root / kind)
    return root


@pytest.fixture
def run(request, monkeypatch, tmp_path):
    """run(pairs or bytes, *flags) runs the script with the stub, or with the kind of model that a test asks for."""
    def main(pairs, *flags):
        Path("pairs.jsonl").write_bytes(pairs if isinstance(pairs, bytes) else "\n".join(map(json.dumps, pairs)).encode())
        monkeypatch.setattr(sys, "argv", ["", "pairs.jsonl", "new/export", "--model", str(main.model), *map(str, flags)])
        main.script.main()

    main.kind = getattr(request, "param", "stub")
    main.model = "stub" if main.kind == "stub" else request.getfixturevalue("saved") / main.kind
    if main.kind == "stub":
        library = types.SimpleNamespace(AutoModelForCausalLM=StubModel, AutoTokenizer=StubTokenizer)
        monkeypatch.setitem(sys.modules, "transformers", library)
    main.script = types.ModuleType("hugging_face")
    exec(compile(SOURCE, SCRIPT, "exec"), vars(main.script))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return main


def pair(prompt="Q: 2 + 2? A:", chosen=" 4", rejected=" No."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def naive_ratio(model, tokenizer, x):
    """log π(chosen) - log π(rejected), token by token, without padding, mask, or code of the script or of dpo.py."""
    total = 0
    for key, sign in (("chosen", 1), ("rejected", -1)):
        prompt = tokenizer(x["prompt"], add_special_tokens=True, split_special_tokens=True).input_ids
        completion = tokenizer(x[key], add_special_tokens=False, split_special_tokens=True).input_ids
        ids = prompt + completion + [tokenizer.eos_token_id]
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sign * sum(logps[t - 1, ids[t]] for t in range(len(prompt), len(ids)))
    return total


@pytest.mark.parametrize("run, beta", [("stub", 0.3), ("stub", 0.003), ("gpt2", 0.3), ("llama3", 0.003)], indirect=["run"])
def test_the_loop_gives_the_losses_and_the_export_of_a_naive_loop(run, beta, capsys):
    """AdamW hides a constant factor of the gradient, but not that the last batch is smaller, unless clipping does."""
    run(PAIRS[:5], "--beta", beta, "--learning_rate", 0.01, "--batch_size", 4, "--seed", 5)
    load = run.script.AutoModelForCausalLM.from_pretrained
    policy, reference, exported = (load(folder).float().eval() for folder in (run.model, run.model, "new/export"))
    tokenizer, order, rows = run.script.AutoTokenizer.from_pretrained("new/export"), PAIRS[:5], []
    random.Random(5).shuffle(order)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, weight_decay=0)
    for batch in (order[:4], order[4:]):
        margins = beta * torch.stack([naive_ratio(policy, tokenizer, x) - naive_ratio(reference, tokenizer, x).detach() for x in batch])
        loss = torch.log1p(torch.exp(-margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        assert (torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0) > 1) == (beta == 0.3)
        optimizer.step()
        rows.append([loss.item(), margins.mean().item()])
    printed = re.findall(r"^step \d/2: loss (\S+), margin (\S+)$", capsys.readouterr().out, re.M)
    assert [[float(x) for x in row] for row in printed] == [pytest.approx(row, abs=1e-4) for row in rows] and abs(rows[1][1]) > 0.01
    assert all(abs(naive_ratio(exported, tokenizer, x) - naive_ratio(policy, tokenizer, x)) < 1e-3 for x in order)


def test_the_reference_is_scored_once_before_training_and_a_sorted_file_is_shuffled_by_the_seed(run, monkeypatch):
    calls, logps, orders = [], run.script.logps, []
    monkeypatch.setattr(run.script, "logps", lambda policy, batch: calls.append(
        (torch.is_grad_enabled(), [len(prompt) - 1 for prompt, _, _ in batch])) or logps(policy, batch))
    for seed in (0, 0, 1):
        run([pair("x" * n) for n in range(1, 33)], "--seed", seed)
        grads, batches = zip(*calls[-8:], strict=True)
        assert grads == (False,) * 4 + (True,) * 4 and batches[:4] == batches[4:]
        assert all(max(batch) - min(batch) > 8 for batch in batches)  # it would be 7 in the order of the file
        orders.append(sum(batches[:4], []))
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(1, 33))


def test_pairs_that_are_empty_or_too_long_are_counted_in_a_file_with_byte_order_mark_and_blank_lines(run, capsys):
    fits = "ü" + "x" * (CONTEXT - len("ü 4".encode()) - 2)  # BOS and EOS
    pairs = [pair(fits, " 4", "5"), pair(fits, "4", " 5"), pair(fits, " 45", "6"), pair(fits, "4", " 56"),
             pair(""), pair(" \n"), pair(chosen=""), pair(rejected=" "), pair(chosen="\u2028 4")]
    data = b"\xef\xbb\xbf" + "\r\n\n  \r\n".join(json.dumps(x, ensure_ascii=False) for x in pairs).encode()
    run(data)
    assert "3 pairs; left out: 4 with an empty text, 2 longer than the model's context of 160" in capsys.readouterr().out
    run(data, "--chat")  # without BOS, because the template has written it
    assert "5 pairs; left out: 4 with an empty text, 0 longer than the model's context of 160" in capsys.readouterr().out


def test_a_first_loss_other_than_ln_2_stops_the_run(run, monkeypatch):
    monkeypatch.setattr(StubModel, "eval", lambda model: model)  # dropout stays on
    with pytest.raises(AssertionError, match="the first losses are not ln 2"):
        run(PAIRS[:8])


def test_a_mask_shifted_by_one_token_stops_the_run(run, monkeypatch):
    monkeypatch.setattr(run.script, "pad_sequence", lambda rows, batch_first: torch.nn.utils.rnn.pad_sequence(
        rows, batch_first).roll(1 if rows[0].dtype == torch.bool else 0, dims=1))
    with pytest.raises(AssertionError, match="the mask is not that of the completion and its EOS"):
        run(PAIRS[:2])


@pytest.mark.parametrize("run", MARKERS, indirect=True)
def test_markers_stay_text_except_in_a_prompt_that_a_chat_template_has_written(run):
    tokenizer, (bos, eos) = run.script.AutoTokenizer.from_pretrained(run.model), MARKERS[run.kind]
    text, special = f"a{bos}b{eos}", [tokenizer.bos_token_id, tokenizer.eos_token_id]
    for chat, markers in ((False, [] if run.kind == "gpt2" else special[:1]), (True, special)):
        prompt, completion = run.script.encode(tokenizer, text, text, chat)
        assert [i for i in prompt if i in special] == markers and [i for i in completion if i in special] == special[1:]
        assert "".join(tokenizer.convert_ids_to_tokens(completion)).endswith(text + eos)


@pytest.mark.parametrize("run, prompt, completion, warnings", [
    ("gpt2", "A:", " Eight", 0), ("gpt2", "A: ", "Eight", 1), ("llama2", "A:", " Eight", 1), ("llama2", "A:", "Eight", 0),
    ("llama2", "A: ", "Eight", 1)], indirect=["run"])
def test_texts_that_have_other_ids_when_encoded_apart_give_one_warning(run, prompt, completion, warnings, capsys):
    run([pair(prompt, completion)] * 3 + [pair("B", "C")] * (run.kind != "llama2"))
    assert capsys.readouterr().out.count("Warning: in 3 pairs, prompt and completion encoded apart differ") == warnings


LINE, STRINGS = json.dumps(pair()).encode() + b"\n", ": expected strings prompt, chosen and rejected"
BAD = [(LINE + b"\noops", ":3" + STRINGS), (b'{"prompt": "x"}', ":1" + STRINGS), ([pair(), pair(rejected=3)], ":2" + STRINGS),
       ([pair(chosen=["a", "b"])], STRINGS), ([pair([{"role": "user", "content": "Hi"}])], STRINGS), (b"\xff", "can't decode"),
       (b"", "no pair to train on"), ([pair("")], "no pair to train on"), (LINE, "above 0", "--beta", 0),
       (LINE, "above 0", "--learning_rate", "nan"), (LINE, "above 0", "--batch_size", -1), (LINE, "", "--model", "./missing")]


@pytest.mark.parametrize("run", ["stub", "llama3"], indirect=True)
@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_gives_one_line_and_exit_code_2_and_leaves_no_folder(case, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(case[0], *case[2:])
    assert re.fullmatch(f"error: .*{re.escape(case[1])}.*\n", capsys.readouterr().err)
    assert stopped.value.code == 2 and not Path("new").exists()


def test_the_documented_command_runs_and_needs_only_dpo_torch_and_transformers(run, monkeypatch, capsys):
    command = re.search(r"python -m (.*)", SOURCE)[1].split()
    Path("pairs.jsonl").write_bytes(LINE)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(StubModel, "config", None)  # some models have no limit of the context
    runpy.run_module(command[0], run_name="__main__")
    assert "step 1/1: loss 0.6931" in capsys.readouterr().out and len(list(Path("export").iterdir())) == 2
    assert set(re.findall(r"^ *(?:import|from) (\w+)", SOURCE, re.M)) - set(sys.stdlib_module_names) == {"dpo", "torch", "transformers"}


@pytest.mark.parametrize("oracle", ["a hand loop", "T5"])
def test_the_line_for_encoder_decoder_models_agrees_with(oracle):
    torch.manual_seed(0)
    logits, tokens, lengths = torch.randn(2, 4, 9), torch.randint(2, 9, (2, 4)), (4, 3)
    right = [sum(logits[i, t].log_softmax(-1)[tokens[i, t]].item() for t in range(lengths[i])) for i in range(2)]
    if oracle == "T5":
        t5 = pytest.importorskip("transformers", reason="the transformers library is not installed")
        model = t5.T5ForConditionalGeneration(t5.T5Config(vocab_size=9, d_model=8, num_layers=1, decoder_start_token_id=0)).eval()
        logits = model(tokens, labels=tokens).logits.detach()
        right = [-n * model(tokens[[i]], labels=tokens[[i], :n]).loss.item() for i, n in enumerate(lengths)]
    names = vars(dpo) | {"logits": logits, "tokens": tokens, "mask": torch.arange(4) < torch.tensor(lengths)[:, None]}
    assert eval(re.search(r"^    (sequence_logps\(F\.pad.*)$", SOURCE, re.M)[1], names).tolist() == pytest.approx(right, abs=1e-4)
