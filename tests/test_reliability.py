"""Nothing is lost: stop a run, break its files, feed it rubbish, let it diverge."""
import glob
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import train
from dpo import dpo_loss, sequence_logps
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

ROOT = os.path.dirname(os.path.abspath(train.__file__))
PAIRS = os.path.join(ROOT, "tests", "pairs.jsonl")
TINY = ("--n_layer 1 --n_embd 16 --sft_steps 40 --steps 40 --batch_size 4 --save_every 7 --device cpu "
        f"--data {PAIRS} --tokenizer toy").split()
SPAWN = multiprocessing.get_context("forkserver")  # children share one import of torch
SPAWN.set_forkserver_preload(["train", "torch._dynamo"])  # the first optimizer imports the latter


def child(arguments, limit=None):
    """train.py as from the command line, its output in the file log beside --out."""
    log = open(arguments[arguments.index("--out") + 1] + ".log", "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore Ctrl-C
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
    """Run to the end: (exit code, what it and earlier runs with this --out printed)."""
    process = start(*arguments, limit=limit)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    with open(str(arguments[arguments.index("--out") + 1]) + ".log") as file:
        return process.exitcode, file.read()


def outcome(folder):
    """All that a run leaves behind: the bytes of its metrics and its weights."""
    weights = [GPT.load(folder / name).state_dict() for name in ("sft.pt", "dpo.pt")]
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
def test_after_ctrl_c_or_sigterm_resume_goes_on_from_the_last_state(whole, tmp_path, number):
    out = tmp_path / "out"
    process = start(*TINY, "--out", out)
    while steps(out) < 10 and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    printed = (tmp_path / "out.log").read_text()
    assert "Traceback" not in printed and load_checkpoint(out / "state.pt")["SFT"][0] >= 7
    if number == signal.SIGINT:
        assert process.exitcode == 130 and "stopped; --resume continues from the last state" in printed
    assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


def wait_for(process, out, text):
    """Until a run has printed text."""
    log = out.with_name(out.name + ".log")
    while not (log.exists() and text in log.read_text()):
        assert process.is_alive()
        time.sleep(0.01)


@pytest.mark.parametrize("flags, seen", [(["--n_pairs", 10**6], " 3/3 "), (["--n_pairs", 3000, "--steps", 1], " 1/1 ")],
                         ids=["while sampling", "in the report"])
def test_ctrl_c_outside_of_a_training_step_ends_the_run_at_once(tmp_path, flags, seen):
    out = tmp_path / "out"
    process = start(*"--sft_steps 3 --n_reviews 100 --n_layer 1 --n_embd 16 --device cpu".split(), *flags, "--out", out)
    wait_for(process, out, seen)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    printed = (tmp_path / "out.log").read_text()
    assert process.exitcode == 128 + signal.SIGINT and "Traceback" not in printed


def test_a_run_that_is_killed_before_its_first_save_resumes_and_keeps_the_files_of_an_earlier_run(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    old = (out / "metrics.jsonl").read_bytes()
    process = start(*TINY, "--seed", 1, "--save_every", 1000, "--out", out)
    while not (out / "metrics.jsonl.old").exists() or steps(out) not in range(3, 30):
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert finish(*TINY, "--seed", 1, "--out", out, "--resume")[0] == 0
    assert (out / "metrics.jsonl.old").read_bytes() == old and steps(out) == 81


def test_resume_of_nothing_begins_and_of_a_finished_run_reports_again(whole, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


def files(folder):
    return {path: open(path, "rb").read() for path in glob.glob(str(folder / "*"))}


def test_without_resume_the_files_of_an_earlier_run_move_aside_together(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = files(out)
    code, printed = finish(*TINY, "--seed", 1, "--sft_learning_rate", 1e9, "--out", out)  # this run fails in its SFT
    assert code == 2 and f"{out}: earlier files are now called metrics.jsonl.old, state.pt.old, sft.pt.old, dpo.pt.old" in printed
    assert {path: content for path, content in files(out).items() if path.endswith(".old")} == {
        path + ".old": content for path, content in before.items()}
    assert not (out / "dpo.pt").exists()  # none beside metrics that are not its own


@pytest.mark.parametrize("flag, name", [("--data", "metrics.jsonl"), ("--data", "state.pt"), ("--data", "metrics.jsonl.old"),
                                        ("--init", "dpo.pt"), ("--init", "sft.pt"), ("--init", "sft.pt.tmp"), ("--init", "far.pt")])
def test_a_run_that_would_overwrite_its_own_input_is_refused(whole, tmp_path, flag, name):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    shutil.copy(PAIRS, out / "metrics.jsonl")
    if flag == "--data":
        shutil.copy(PAIRS, out / name)
    elif name.endswith(".tmp"):
        shutil.copy(out / "sft.pt", out / name)
    elif name == "far.pt":  # a link in the folder to a file elsewhere would itself be moved
        (out / "sft.pt").rename(tmp_path / "elsewhere.pt")
        os.symlink(tmp_path / "elsewhere.pt", out / name)
    os.symlink(out, tmp_path / "link")  # the same folder by another name
    before, arguments = files(out), [*TINY, flag, tmp_path / "link" / name, "--out", out]
    code, printed = finish(*arguments)
    assert code == 2 and printed.splitlines()[-1].endswith(f"{name}: this run could overwrite it; choose another --out")
    assert files(out) == before


def test_data_is_known_by_what_was_read(whole, tmp_path):
    """Also from a pipe, which cannot be read twice: under another name the same pairs resume."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    program = [sys.executable, os.path.join(ROOT, "train.py"), *TINY, "--data", "/dev/stdin", "--out", str(out), "--resume"]
    with open(PAIRS) as file:
        text = file.read()
    resumed = subprocess.run(program, input=text, capture_output=True, text=True)
    assert resumed.returncode == 0 and same(outcome(out), whole[1]), resumed.stderr
    resumed = subprocess.run(program, input=text.replace("Eight", "Seven", 1), capture_output=True, text=True)
    assert resumed.returncode == 2 and "state.pt: not a state, or made with another texts" in resumed.stderr


def test_a_state_of_another_run_is_refused_by_the_name_of_the_difference(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    state = load_checkpoint(out / "state.pt")
    def refused(*flags):
        before = files(out)
        try:
            train.main([str(a) for a in (*TINY, "--out", out, "--resume", *flags)])
        except ValueError as error:
            message = str(error)
        assert files(out) == before and "\n" not in message
        return message
    assert "state.pt: not a state, or made with another beta" in refused("--beta", 0.5)
    assert "state.pt: not a state, or made with another seed" in refused("--seed", 1)
    assert "state.pt: not a state, or made with another weights" in refused("--init", whole[0] / "sft.pt", "--beta", 1, "--learning_rate", 1e-3,
                                                  "--sft_learning_rate", 4e-3, "--tokenizer", "toy")
    for name in ("version", "torch", "threads", "texts", "model"):
        save_checkpoint(out / "state.pt", state | {"made_with": state["made_with"] | {name: "0"}})
        assert f"state.pt: not a state, or made with another {name}" in refused()
    save_checkpoint(out / "state.pt", {})
    assert "state.pt: not a state, or made with another held_out" in refused()
    for wrong in ((out / "sft.pt").read_bytes(), b"", b"rubbish", (whole[0] / "state.pt").read_bytes()[:-99]):
        (out / "state.pt").write_bytes(wrong)
        assert "state.pt: " in refused()


def test_a_state_knows_the_four_modules_by_their_content(tmp_path, monkeypatch):
    versions = []
    for changed in (None, None, "dpo.py", "model.py", "data.py", "train.py"):
        folder = tmp_path / str(len(versions))
        folder.mkdir()
        for name in ("dpo.py", "model.py", "data.py", "train.py"):
            shutil.copy(os.path.join(ROOT, name), folder)
        if changed:
            with open(folder / changed, "a") as file:
                file.write("\n")
        monkeypatch.setattr(data, "__file__", str(folder / "data.py"))
        run = train.Run(train.Config(out=str(folder / "out"), device="cpu"), GPT(GPTConfig(20, 16, 1, 1, 8)), [])
        versions.append(run.state["made_with"]["version"])
    assert versions[0] == versions[1] and len(set(versions)) == 5


def test_metrics_that_were_cut_or_deleted_are_restored_from_the_state(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    for content in (b"", b'{"stage": "SFT", "st', None):
        (out / "metrics.jsonl").unlink() if content is None else (out / "metrics.jsonl").write_bytes(content)
        assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


def test_resume_writes_the_metrics_anew_and_does_not_cut_those_that_are_there(whole, tmp_path):
    """Cut in place they would be lost to a full disk or a kill. A second name of the old file shows it."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    os.link(out / "metrics.jsonl", tmp_path / "linked")
    assert finish(*TINY, "--out", out, "--resume", limit=1000)[0] == 2
    assert (out / "metrics.jsonl").read_bytes() == whole[1][0]
    (out / "metrics.jsonl").write_text("longer than the new ones " * 10**4)
    assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])
    assert (tmp_path / "linked").read_text() == "longer than the new ones " * 10**4


def test_killed_before_the_first_state_resume_replaces_no_file_of_an_earlier_run(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = files(out)
    open_run = lambda resume: train.Run(train.Config(out=str(out), device="cpu", resume=resume), GPT(GPTConfig(20, 16, 1, 1, 8)), [])
    with monkeypatch.context() as patched:
        patched.setattr(train, "save_checkpoint", lambda *_: sys.exit())
        with pytest.raises(SystemExit):
            open_run(False)
    open_run(True)
    assert {path: content for path, content in files(out).items() if path.endswith(".old")} == {
        path + ".old": content for path, content in before.items()}


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
    torch.save({"weights": model.to_gpt2(), "n_head": 1, "tokenizer": ""}, buffer)
    for _ in range(300):
        path.write_bytes(corrupt(buffer.getvalue(), rng))
        try:
            loaded = GPT.load(path)
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
    torch.save({"weights": Code()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: not a checkpoint, damaged, or larger than memory"):
        GPT.load(tmp_path / "c.pt")
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


def test_memory_that_ends_while_loading_is_not_only_called_damage(tmp_path, monkeypatch):
    GPT(GPTConfig(20, 16, 1, 1, 8)).save(tmp_path / "c.pt")
    def full(*arguments, **options):
        raise MemoryError
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(ValueError, match="c.pt: not a checkpoint, damaged, or larger than memory"):
        GPT.load(tmp_path / "c.pt")


@pytest.mark.parametrize("limit", [3000, 9000], ids=["metrics do not fit", "state does not fit"])
def test_a_full_disk_is_one_line_and_nothing_is_cut_in_silence(tmp_path, limit):
    """The system refuses to let any file grow beyond a limit, as a full disk does."""
    out = tmp_path / "out"
    code, printed = finish(*TINY, "--save_every", 1000, "--out", out, limit=limit)
    assert code == 2 and printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed


def test_ctrl_c_while_saving_is_ctrl_c_and_what_was_there_stays(tmp_path):
    """50 interrupts at random moments: none becomes another error, and what is there is always whole."""
    rng, content, handler = np.random.default_rng(0), {"parts": [torch.ones(5000)] * 200}, signal.signal(signal.SIGALRM, signal.default_int_handler)
    save_checkpoint(tmp_path / "c.pt", content)
    for _ in range(50):
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.02), 0.5)  # again, since 1 in 3,000 is lost inside torch
            while True:
                save_checkpoint(tmp_path / "c.pt", content)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(load_checkpoint(tmp_path / "c.pt")["parts"]) == 200
    signal.signal(signal.SIGALRM, handler)


def test_on_a_full_disk_the_last_state_stays(whole, tmp_path):
    out = tmp_path / "out"
    process = start(*TINY, "--out", out)
    while not (out / "state.pt").exists() and process.is_alive():
        time.sleep(0.01)
    process.terminate()
    process.join()
    before = (out / "state.pt").read_bytes()
    code, printed = finish(*TINY, "--out", out, "--resume", limit=len(before) - 1)
    assert code == 2 and f"error: {out}/state.pt cannot be written" in printed and "Traceback" not in printed
    assert (out / "state.pt").read_bytes() == before
    assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


def test_a_reader_that_goes_away_ends_the_run_quietly_and_a_terminal_without_utf8_loses_no_report(tmp_path):
    program = [sys.executable, os.path.join(ROOT, "train.py"), *TINY, "--out", str(tmp_path / "a")]
    first = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first.stdout.readline()
    first.stdout.close()
    assert first.stderr.read() == "" and first.wait() == -signal.SIGPIPE
    ascii_only = subprocess.run([*program[:-1], str(tmp_path / "b")], capture_output=True, text=True,
                                env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0 and "KL(???_ref) from " in ascii_only.stdout, ascii_only.stderr
    assert b"report/kl" in (tmp_path / "b" / "metrics.jsonl").read_bytes()
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *program[:-1], str(tmp_path / "c")], capture_output=True)
    assert closed.returncode == 0 and closed.stderr == b"" and (tmp_path / "c" / "dpo.pt").exists()


@pytest.mark.parametrize("flags, message", [
    (["--n_reviews", 4294967295], "error: Unable to allocate"), (["--sft_learning_rate", 1e6, "--sft_steps", 1], "error: "),
    (["--learning_rate", 1e6, "--steps", 1], "error: step 1: the loss after it is not finite"),
    (["--learning_rate", 1e9, "--steps", 1], "error: step 1: the loss after it is not finite")],
    ids=["memory", "learning rate of SFT", "learning rate of DPO", "a larger one"])
def test_what_numbers_cannot_bear_is_one_line(tmp_path, flags, message):
    out = tmp_path / "out"
    code, printed = finish(*"--n_layer 1 --n_embd 16 --n_reviews 50 --n_pairs 9 --sft_steps 2 --steps 2 --device cpu".split(), *flags, "--out", out)
    assert code == 2 and printed.splitlines()[-1].startswith(message) and "Traceback" not in printed, printed
    assert not (out / "dpo.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """After the last update of a stage no later step would tell."""
    model, cfg = GPT(GPTConfig(20, 16, 1, 1, 8)), train.Config(out=str(tmp_path), device="cpu", batch_size=4)
    run = train.Run(cfg, model, [])
    loss_of = lambda batch: {"loss": model.wte.weight[batch].sum(1)}
    with pytest.raises(ValueError, match="step 1: the loss after it is not finite; is the learning rate too high"):
        run.train("DPO", model, [[[1]]] * 4, loss_of, 1, 1e39)
    assert "DPO" not in load_checkpoint(tmp_path / "state.pt")


def test_a_figure_that_is_not_a_number_is_null(tmp_path):
    run = train.Run(train.Config(out=str(tmp_path), device="cpu"), GPT(GPTConfig(20, 16, 1, 1, 8)), [])
    run.write(kl=math.nan, loss=-math.inf, stage="x", step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kl": null, "loss": null, "stage": "x", "step": 1}\n'


@pytest.mark.parametrize("save_every, message", [
    (1000, r"error: step \d+: loss .* is the learning rate too high\? Batch: \["), (1, "error: step 1: the loss after it is not finite")])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_good_state(whole, tmp_path, save_every, message):
    out = tmp_path / "out"
    code, printed = finish(*TINY, "--learning_rate", "1e9", "--save_every", save_every, "--out", out)
    assert code == 2 and "Traceback" not in printed and re.match(message, printed.splitlines()[-1])
    state, lines = load_checkpoint(out / "state.pt"), (out / "metrics.jsonl").read_text().splitlines()
    assert set(state) == {"made_with", "metrics", "SFT"} and state["SFT"][0] == 40 and not (out / "dpo.pt").exists()
    assert all(torch.equal(p, whole[1][1][0][name]) for name, p in state["SFT"][1].items())
    assert all(math.isfinite(json.loads(line)["loss"]) for line in lines)


@pytest.mark.parametrize("autocast", [False, True])
def test_extreme_log_probabilities_and_logits_have_finite_losses_and_gradients(autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for scale in (1.0, 1e3, 1e6):
            policy, ref = (-scale * torch.tensor([[0., 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]])).split(2)
            policy.requires_grad_()
            for smoothing in (0.0, 0.1):
                losses = dpo_loss(*policy, *ref, 5.0, label_smoothing=smoothing)[0]
                gradient, = torch.autograd.grad(losses.sum(), policy)
                assert losses.isfinite().all() and gradient.isfinite().all()
        logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]]], requires_grad=True)
        logps = sequence_logps(logits, torch.tensor([[0, 1, 0]]), torch.tensor([[False, True, True]]))
        assert logps.item() == pytest.approx(-4e4 - math.log(2)) and torch.autograd.grad(logps.sum(), logits)[0].isfinite().all()


@pytest.mark.slow
def test_soak_20000_dpo_steps_leave_memory_flat(capsys):
    """Resident memory after 1,000 steps and after 20,000: less than 2 % between the two."""
    sizes, tokenizer = {}, data.toy_tokenizer()
    pairs, _, _ = data.split_pairs(data.read_jsonl(PAIRS), tokenizer, 256, 0.1, seed=0)
    cfg = train.Config(batch_size=4, device="cpu")
    model = GPT(GPTConfig(tokenizer.n_vocab, 256, 1, 1, 16))
    ref_logps, optimizer = train.score(model, pairs, cfg), torch.optim.AdamW(model.parameters())
    loss_of = lambda batch: train.pair_metrics(train.logps_of(model, [pairs[i] for i in batch], cfg), ref_logps[batch], cfg)
    for step, _ in train.fit(model, optimizer, [sum(map(len, pair)) for pair in pairs], loss_of, 20_000, 1e-5, cfg):
        if step in (1000, 5000, 10000, 20000):
            with open("/proc/self/statm") as file:
                sizes[step] = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    with capsys.disabled():
        print(" [MiB after steps:", {step: round(size, 1) for step, size in sizes.items()}, end="] ")
    assert max(sizes.values()) < 1.02 * sizes[1000]
