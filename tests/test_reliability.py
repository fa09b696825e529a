"""Nothing is lost: stop a run, break its files, feed it rubbish, let it diverge."""
import glob
import io
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time

import numpy as np
import pytest
import torch

import data
import train
from dpo import dpo_loss, sequence_logps
from model import GPT, GPTConfig, read, save

ROOT = os.path.dirname(os.path.abspath(train.__file__))
PAIRS = os.path.join(ROOT, "tests", "pairs.jsonl")
TINY = ("--n_layer 1 --n_embd 16 --sft_steps 40 --steps 40 --batch_size 16 --save_every 7 --device cpu "
        f"--data {PAIRS} --tokenizer toy").split()
SPAWN = multiprocessing.get_context("forkserver")  # children share one import of torch
SPAWN.set_forkserver_preload(["train"])


def child(arguments, limit=None):
    """train.py as from the command line, its output in the file log beside --out."""
    log = open(arguments[arguments.index("--out") + 1] + ".log", "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["train.py", *arguments]
    try:
        with open(os.path.join(ROOT, "train.py")) as file:
            exec(compile(file.read(), "train.py", "exec"), {"__name__": "__main__", "__file__": "train.py"})
    finally:
        log.flush()


def start(*arguments, limit=None):
    process = SPAWN.Process(target=child, args=([str(a) for a in arguments], limit))
    process.start()
    return process


def finish(*arguments, limit=None):
    """Run to the end: (exit code, what it printed)."""
    process = start(*arguments, limit=limit)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    with open(str(arguments[arguments.index("--out") + 1]) + ".log") as file:
        return process.exitcode, file.read()


def outcome(folder):
    """All that a run leaves behind: the bytes of its metrics and its weights."""
    weights = [read(folder / name)["model"] for name in ("sft.pt", "dpo.pt")]
    return (folder / "metrics.jsonl").read_bytes(), weights


def steps(folder):
    """How many steps are written."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x[name], y[name]) for x, y in zip(a[1], b[1]) for name in x)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder, outcome)."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    code, printed = finish(*TINY, "--out", folder)
    assert code == 0, printed
    return folder, outcome(folder)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_many_times_ends_like_one_that_was_not(whole, tmp_path, capsys, kills):
    """SIGKILL at random steps of both stages and in the report, at a random moment of the step; each
    time resumed, and at last to the end. Weights and metrics are equal, bit for bit."""
    rng, out, places = np.random.default_rng(0), tmp_path / "out", []
    for step in [*sorted(rng.integers(0, 80, kills - 1)), 80]:
        process = start(*TINY, "--out", out, "--resume")
        while steps(out) < step and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        places.append(steps(out))
        process.kill()
        process.join()
    code, printed = finish(*TINY, "--out", out, "--resume")
    assert code == 0, printed
    with capsys.disabled():
        print(f" [killed at these of 80 steps: {places}] ", end="")
    assert len(set(places)) > kills / 2 and same(outcome(out), whole[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_the_step_at_hand_and_resume_goes_on(whole, tmp_path, number):
    out = tmp_path / "out"
    process = start(*TINY, "--out", out, "--save_every", 1000)
    while steps(out) < 10:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    printed = (tmp_path / "out.log").read_text()
    assert process.exitcode == 128 + number and "Traceback" not in printed
    step = read(out / "state.pt")["SFT"]["step"]
    assert f"stopped after SFT step {step}; --resume goes on from there" in printed and step % 7
    assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


def test_resume_of_nothing_begins_and_of_a_finished_run_reports_again(whole, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


def test_a_state_of_another_run_is_refused_by_the_name_of_the_difference(whole, tmp_path):
    folder, _ = whole
    kept = {path: open(path, "rb").read() for path in glob.glob(str(folder / "*"))}
    other = tmp_path / "other.jsonl"
    with open(PAIRS, "rb") as file:
        other.write_bytes(file.read().replace(b"Eight", b"Seven", 1))
    def refused(*flags):
        with pytest.raises(ValueError) as error:
            train.main([*TINY, "--out", str(folder), "--resume", *map(str, flags)])
        assert {path: open(path, "rb").read() for path in kept} == kept
        return str(error.value)
    assert "state.pt: made with beta 1.0, this run has 0.5" in refused("--beta", 0.5)
    assert "state.pt: made with seed 0, this run has 1" in refused("--seed", 1)
    assert "state.pt: made with data 466d" in refused("--data", other)
    state = read(folder / "state.pt")
    torch.save(state | {"run": state["run"] | {"version": "0"}}, folder / "state.pt")
    kept[str(folder / "state.pt")] = (folder / "state.pt").read_bytes()
    assert "state.pt: made with version 0, this run has 1 on torch" in refused()
    for wrong in ((folder / "sft.pt").read_bytes(), b"", b"rubbish", kept[str(folder / "state.pt")][:-99]):
        (folder / "state.pt").write_bytes(wrong)
        kept[str(folder / "state.pt")] = wrong
        assert "state.pt: " in refused()
    save(str(folder / "state.pt"), state)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:50]))
    kept |= {str(folder / name): (folder / name).read_bytes() for name in ("state.pt", "metrics.jsonl")}
    assert "metrics.jsonl: shorter than when" in refused()
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))


def corrupt(content, rng):
    """One of: flipped bits, a cut, two swapped blocks, a block of zeros, a repeated block."""
    content, n = bytearray(content), len(content)
    kind, a, b = rng.integers(5), *sorted(rng.integers(0, n, 2))
    size = int(rng.integers(1, max(2, n // 8)))
    if kind == 0:
        for i in rng.integers(0, n, rng.integers(1, 9)):
            content[i] ^= 1 << rng.integers(8)
    elif kind == 1:
        del content[a:]
    elif kind == 2:
        content[a:a + size], content[b:b + size] = content[b:b + size], content[a:a + size]
    elif kind == 3:
        content[a:a + size] = bytes(len(content[a:a + size]))
    else:
        content[a:a] = content[b:b + size]
    return bytes(content)


def test_300_corrupted_checkpoints_are_refused_or_harmless(tmp_path, capsys):
    """Never another error, never other weights: whatever loads has the weights that were saved."""
    torch.manual_seed(0)
    model, rng, refused, harmless = GPT(GPTConfig(20, 16, 1, 1, 8)), np.random.default_rng(0), 0, 0
    path, buffer = tmp_path / "c.pt", io.BytesIO()
    torch.save({"config": vars(model.config), "model": model.state_dict()}, buffer)
    for _ in range(300):
        path.write_bytes(corrupt(buffer.getvalue(), rng))
        try:
            loaded = GPT.load(path, 20)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        else:
            assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())
            harmless += 1
    with capsys.disabled():
        print(f" [{refused} refused, {harmless} harmless] ", end="")
    assert refused > 200


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"config": Code(), "model": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: not a checkpoint, or damaged"):
        GPT.load(tmp_path / "c.pt", 20)
    assert not (tmp_path / "ran").exists()


def test_600_corrupted_files_of_pairs_are_read_or_refused_in_one_line(tmp_path, capsys):
    rng, path, refused = np.random.default_rng(0), tmp_path / "p.jsonl", 0
    with open(PAIRS, "rb") as file:
        content = b"".join(file.readlines()[:12])
    tokenizer = data.toy_tokenizer()
    for _ in range(600):
        path.write_bytes(corrupt(content, rng))
        try:
            data.split_pairs(data.read_jsonl(path), tokenizer, 256, 0.1, seed=0)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    with capsys.disabled():
        print(f" [{refused} refused, {600 - refused} still valid] ", end="")
    assert 300 < refused < 600


def test_a_full_disk_is_one_line_and_the_last_state_stays(whole, tmp_path):
    """The system refuses to let any file grow beyond a limit, as a full disk does."""
    out = tmp_path / "out"
    code, printed = finish(*TINY, "--out", out, limit=9000)
    assert code == 2 and printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed
    process = start(*TINY, "--out", out)
    while not (out / "state.pt").exists():
        time.sleep(0.01)
    process.terminate()
    process.join()
    before = (out / "state.pt").read_bytes()
    code, printed = finish(*TINY, "--out", out, "--resume", limit=len(before) - 1)
    assert code == 2 and printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed
    assert (out / "state.pt").read_bytes() == before
    assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


@pytest.mark.parametrize("flags, stage", [(["--sft_learning_rate", "1e9"], "SFT"), (["--learning_rate", "1e9"], "DPO")])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_good_state(tmp_path, flags, stage):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=rf"{stage} step \d+: loss .* is the learning rate too high\? Its examples: \["):
        train.main([*TINY, *flags, "--save_every", "1", "--out", str(out)])
    state = read(out / "state.pt")
    assert all(p.isfinite().all() for p in state[stage]["model"].values())
    last = json.loads((out / "metrics.jsonl").read_bytes().splitlines()[-1])
    assert last["stage"] == stage and last["step"] == state[stage]["step"] and math.isfinite(last["loss"])


@pytest.mark.parametrize("autocast", [False, True])
def test_extreme_log_probabilities_and_logits_have_finite_losses_and_gradients(autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for scale in (1.0, 1e3, 1e6):
            logps = -scale * torch.tensor([[0., 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
            logps.requires_grad_()
            for smoothing in (0.0, 0.1):
                losses = dpo_loss(*logps, 5.0, label_smoothing=smoothing)[0]
                gradient, = torch.autograd.grad(losses.sum(), logps)
                assert losses.isfinite().all() and gradient.isfinite().all()
        logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]]], requires_grad=True)
        logps = sequence_logps(logits, torch.tensor([[0, 1, 0]]), torch.tensor([[False, True, True]]))
        assert logps.item() == pytest.approx(-4e4 - math.log(2)) and torch.autograd.grad(logps.sum(), logits)[0].isfinite().all()


@pytest.mark.slow
def test_soak_20000_dpo_steps_leave_memory_flat(tmp_path, capsys):
    """Resident memory after 1,000 steps and after 20,000: less than 2 % between the two."""
    sizes = {}
    class Log:
        start = lambda self, stage, steps, **parts: 0
        def step(self, step, metrics, tokens):
            if step in (1000, 5000, 10000, 20000):
                with open("/proc/self/statm") as file:
                    sizes[step] = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    tokenizer = data.toy_tokenizer()
    pairs, _, _ = data.split_pairs(data.read_jsonl(PAIRS), tokenizer, 256, 0.1, seed=0)
    cfg = train.Config(steps=20_000, batch_size=4, learning_rate=1e-5, device="cpu")
    model = GPT(GPTConfig(tokenizer.n_vocab, 256, 1, 1, 16))
    train.fit(model, pairs, cfg, Log(), train.score(model, pairs, cfg))
    with capsys.disabled():
        print(" [MiB after steps:", {step: round(size, 1) for step, size in sizes.items()}, end="] ")
    assert max(sizes.values()) < 1.02 * sizes[1000]
