"""torchrun.py: two processes compute what one process computes."""
import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import data
import train
from model import GPT, GPTConfig
from tests.conftest import ROOT
from tests.examples import torchrun as example

PAIRS = ROOT / "tests" / "pairs.jsonl"


@pytest.fixture
def init(tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(data.toy_tokenizer().n_vocab, n_head=2, n_embd=16, tokenizer="toy")).save(tmp_path / "init.pt")
    return tmp_path / "init.pt"


def test_two_processes_get_the_weights_of_one(init, tmp_path):
    """Batches of 3 in 2 micro-batches leave one process without a pair. Observed difference: 2e-7 of the largest weight."""
    flags = {"data": str(PAIRS), "init": str(init), "out": str(tmp_path), "steps": 4, "learning_rate": 1e-5,
             "batch_size": 3, "grad_accum": 2, "device": "cpu", "dtype": "float32"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.examples.torchrun"]
    done = subprocess.run([*torchrun, *(f"--{name}={value}" for name, value in flags.items())], capture_output=True, text=True,
                          timeout=200, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("200 pairs in ") == 1  # the first process prints the counts
    cfg = train.Config(**flags)
    reference = train.make_model(cfg).requires_grad_(False)
    pairs = train.FileTask(cfg, reference).training_pairs
    batches = data.batches(train.score_pairs(reference, pairs, cfg), cfg.batch_size, cfg.seed)
    policy, losses = copy.deepcopy(reference).requires_grad_(True), []
    optimizer = train.make_optimizer(policy)
    for step in range(1, 5):
        optimizer.param_groups[0]["lr"] = train.warmup_cosine(step, 4, 1e-5)
        losses.append(train.train_step(policy, optimizer, next(batches), train.dpo_objective, cfg)["loss"])
    assert list(map(float, re.findall(r"loss (\S+)", done.stdout))) == pytest.approx(losses, abs=1e-3)
    two = GPT.load(tmp_path / "dpo.pt").state_dict()
    for name, weight in policy.state_dict().items():  # the gradient of the keys' bias is rounding noise, which Adam enlarges
        assert name.endswith("c_attn.bias") or (two[name] - weight).abs().max() < 1e-5 * weight.abs().max(), name
    assert not torch.equal(two["wte.weight"], reference.wte.weight)


@pytest.mark.parametrize("record, flags, message", [
    ({"prompt": "q", "chosen": "a" * 300, "rejected": "b"}, [], "{data}: no pair to train on"), ({"prompt": "q"}, [], "{data}:1: expected strings"),
    ({}, ["--beta", "0"], "--beta: expected a finite number"), ({}, ["--data", "nope"], "nope: No such file"), ({}, ["--init", "nope"], "nope: expected a file")])
def test_bad_input_is_one_line_before_the_processes_meet(init, tmp_path, monkeypatch, capsys, record, flags, message):
    """Each process reads the input for itself, so here one is enough."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["torchrun.py", "--data", str(path), "--init", str(init), "--out", str(tmp_path / "out"), "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as stop:
        example.main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1 and errors.startswith("error: " + message.replace("{data}", str(path)))
    assert not (tmp_path / "out").exists()
