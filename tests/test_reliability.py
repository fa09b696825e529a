"""Nothing is lost: runs are killed and resumed, files are damaged, disks are full."""
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch

import data
import train
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tests.conftest import ROOT

PAIRS = str(ROOT / "tests" / "pairs.jsonl")
TINY = (*"--n_layer 1 --n_embd 16 --sft_steps 40 --steps 40 --batch_size 4 --save_every 7 --device cpu --tokenizer toy".split(), "--data", PAIRS)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="these tests start and kill processes as POSIX does")
if os.name == "posix":
    SPAWN = multiprocessing.get_context("forkserver")  # its children share one import of torch
    SPAWN.set_forkserver_preload(["train", "torch._dynamo"])  # the first optimizer imports the latter


def child(arguments, limit, folder):
    """folder/train.py as from the command line. What it prints goes to a log beside --out."""
    log = open(arguments[arguments.index("--out") + 1] + ".log", "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore Ctrl-C
    sys.argv = ["train.py", *arguments]
    if folder != ROOT:  # import the modules of that folder
        sys.path.insert(0, str(folder))
        for name in ("dpo", "model", "data", "train"):
            sys.modules.pop(name, None)
    try:
        runpy.run_path(str(folder / "train.py"), run_name="__main__")
    finally:
        log.flush()


def start(*arguments, limit=None, folder=ROOT):
    process = SPAWN.Process(target=child, args=([str(a) for a in arguments], limit, folder), daemon=True)  # ends with the tests
    process.start()
    return process


def finish(*arguments, **options):
    """Run to the end: (exit code, what this and earlier runs with the same --out printed)."""
    process = start(*arguments, **options)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    with open(str(arguments[arguments.index("--out") + 1]) + ".log") as file:
        return process.exitcode, file.read()


def outcome(folder):
    """What a run leaves behind: the bytes of its metrics, and its weights."""
    return (folder / "metrics.jsonl").read_bytes(), [GPT.load(folder / name).state_dict() for name in ("sft.pt", "dpo.pt")]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x[name], y[name]) for x, y in zip(a[1], b[1], strict=True) for name in x)


def steps(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption: (folder, outcome)."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    code, printed = finish(*TINY, "--out", folder)
    assert code == 0, printed
    return folder, outcome(folder)


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of that run's folder."""
    return shutil.copytree(whole[0], tmp_path / "out")


@pytest.mark.parametrize("kills", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights_and_metrics(whole, tmp_path, capsys, kills):
    """SIGKILL at random moments of set-up, both stages, saving and the report. The result is equal bit for bit."""
    rng, out, places = np.random.default_rng(0), tmp_path / "out", []
    for step in [0, *sorted(rng.integers(0, 80, kills - 2)), 80]:
        process = start(*TINY, "--out", out, *(["--resume"] if (out / "state.pt").exists() else []))
        while steps(out) < step and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        places.append(steps(out))
        process.kill()
        process.join()
    code, printed = finish(*TINY, "--out", out, *(["--resume"] if (out / "state.pt").exists() else []))
    assert code == 0, printed
    with capsys.disabled():
        print(f" [killed at these of 80 steps: {places}] ", end="")
    assert len(set(places)) > kills / 2 and same(outcome(out), whole[1])


def test_a_run_that_is_killed_before_its_first_state_can_be_started_again(whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.pt.tmp").write_bytes(b"half a st")
    assert finish(*TINY, "--out", tmp_path / "out")[0] == 0 and same(outcome(tmp_path / "out"), whole[1])


def wait_for(process, out, text):
    """Until a run has printed text."""
    log = out.with_name(out.name + ".log")
    while not (log.exists() and text in log.read_text()):
        assert process.is_alive()
        time.sleep(0.01)


@pytest.mark.parametrize("flags, text", [((), "SFT   "), (("--save_every", 1), "DPO   "), (("--sft_steps", 1, "--steps", 1), "DPO       1/1")],
                         ids=["in a step", "while saving", "in the report"])
def test_ctrl_c_ends_a_run_with_one_line_and_resume_continues_it(tmp_path, flags, text):
    out = tmp_path / "out"
    process = start(*TINY, *flags, "--out", out)
    wait_for(process, out, text)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    printed = (tmp_path / "out.log").read_text()
    assert process.exitcode == 130 and "Traceback" not in printed
    assert printed.endswith("\nstopped; if a state was saved, --resume continues from it\n")
    assert finish(*TINY, *flags, "--out", out, "--resume")[0] == 0


BUGS = {  # a student's mistakes: (file, old, new, the last line of the traceback)
    "shape": ("dpo.py", "losses = -F.logsigmoid(margins)", "losses = -F.logsigmoid(margins) + torch.zeros(5)", "RuntimeError: The size of tensor"),
    "not implemented": ("dpo.py", "losses = -F.logsigmoid(margins)", 'raise NotImplementedError("todo")', "NotImplementedError: todo"),
    "value": ("model.py", "x = block(x, cache)", 'raise ValueError("mine")', "ValueError: mine"),
    "set-up": ("model.py", "self.ln_f = nn", "self.ln_f = n", "NameError: name 'n' is not defined"),
    "detached": ("train.py", "return losses, preference_metrics(", "return losses.detach(), preference_metrics(", "RuntimeError: element 0 of tensors does not require grad")}


@pytest.mark.parametrize("name", BUGS)
def test_a_programming_error_keeps_its_traceback(tmp_path, name):
    """It names the file, the line and the error, and the exit code is 1."""
    file, old, new, message = BUGS[name]
    for module in ("dpo.py", "model.py", "data.py", "train.py"):
        text = (ROOT / module).read_text(encoding="utf-8")
        assert text.count(old) == (module == file)
        (tmp_path / module).write_text(text.replace(old, new), encoding="utf-8")
    code, printed = finish(*TINY, "--sft_steps", 1, "--steps", 1, "--out", tmp_path / "out", folder=tmp_path)
    assert code == 1 and "Traceback" in printed and printed.splitlines()[-1].startswith(message), printed
    assert f"{tmp_path}/{file}" in printed and (name == "detached" or new.split(";")[0] in printed)


def refused(*arguments, capsys):
    """The line that train.py prints to standard error, after checking that no file has changed."""
    out = train.Path(arguments[arguments.index("--out") + 1])
    before = files(out)
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and files(out) == before
    return error


def test_a_folder_with_an_earlier_run_is_refused_and_the_message_names_the_three_ways_out(copied, tmp_path, capsys):
    expected = f"error: {copied} holds an earlier run: continue it with --resume, replace it with --overwrite, or choose another folder with --out\n"
    assert refused(*TINY, "--out", copied, capsys=capsys) == expected
    for name in ("metrics.jsonl", "sft.pt", "dpo.pt"):  # a part of it is enough
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(copied / name, folder)
        assert f"error: {folder} holds an earlier run: " in refused(*TINY, "--out", folder, capsys=capsys)


def test_overwrite_replaces_an_earlier_run_and_only_its_four_files(copied, whole, tmp_path):
    for name in ("sft.pt", "dpo.pt"):  # of another model
        save_checkpoint(copied / name, {"weights": {}})
    (copied / "notes.txt").write_text("mine")
    train.main([*TINY, "--out", str(copied), "--overwrite"])
    assert (copied / "notes.txt").read_text() == "mine" and same(outcome(copied), whole[1])
    train.main([*TINY, "--out", str(copied), "--resume"])  # --overwrite may differ
    train.main([*TINY, "--out", str(tmp_path / "new"), "--overwrite"])  # there is nothing to delete
    assert same(outcome(tmp_path / "new"), whole[1])


def test_overwrite_deletes_nothing_before_all_input_is_read_and_checked(copied, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}')
    (tmp_path / "blank.jsonl").write_text('{"prompt": "x", "chosen": "", "rejected": "y"}')
    for name in ("nope", "bad", "blank"):
        assert f"{name}.jsonl" in refused(*TINY, "--data", tmp_path / f"{name}.jsonl", "--out", copied, "--overwrite", capsys=capsys)
    for flags in (["--beta", "inf"], ["--n_head", "3"], ["--tokenizer", "gpt3"], ["--resume"]):
        refused(*TINY, *flags, "--out", copied, "--overwrite", capsys=capsys)
    refused(*TINY[4:], "--init", tmp_path / "nope.pt", "--out", copied, "--overwrite", capsys=capsys)


@pytest.mark.parametrize("name", train.FILES)
def test_overwrite_is_refused_if_the_run_reads_one_of_the_files(copied, tmp_path, capsys, name):
    """Also under another path: a link to it, or a path with dots."""
    init = [flag for flag in TINY[4:] if flag not in ("--tokenizer", "toy")]
    if name in ("sft.pt", "dpo.pt"):
        (tmp_path / "link.pt").symlink_to(copied / name)
        for path in (copied / name, tmp_path / "link.pt", copied / ".." / "out" / name):
            assert "--overwrite would delete " in refused(*init, "--init", path, "--out", copied, "--overwrite", capsys=capsys)
    shutil.copy(PAIRS, copied / name)  # as --data, under a name of the four
    assert "--overwrite would delete " in refused(*TINY, "--data", copied / name, "--out", copied, "--overwrite", capsys=capsys)


def test_a_kill_after_overwrite_never_leaves_a_state_of_the_earlier_run(copied, whole, monkeypatch):
    """Between any two calls that change a file: if a state is there, it is the new run's, or nothing is deleted yet."""
    before, seen = files(copied), []
    def watched(function):
        def call(*arguments, **options):
            seen.append(files(copied))
            return function(*arguments, **options)
        return call
    monkeypatch.setattr(train.Path, "unlink", watched(train.Path.unlink))
    monkeypatch.setattr(train, "save_checkpoint", watched(train.save_checkpoint))
    train.main([*TINY, "--seed", "1", "--out", str(copied), "--overwrite"])
    assert seen[0] == before and len(seen) > 10
    for moment in seen[1:]:
        assert moment.get("state.pt") != before["state.pt"]
    assert seen[4].keys() == set()  # after four deletions, before the first save


def test_runs_that_are_killed_right_after_overwrite_can_be_resumed_or_overwritten(whole, tmp_path):
    other, rng = tmp_path / "other", np.random.default_rng(1)
    train.main([*TINY, "--seed", "1", "--out", str(other)])
    for i in range(2):
        out = shutil.copytree(other, tmp_path / str(i))
        process = start(*TINY, "--out", out, "--overwrite")
        while process.is_alive() and (out / "dpo.pt").exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        possible = (out / "state.pt").exists()  # then it is the new run's
        code, printed = finish(*TINY, "--out", out, "--resume" if possible else "--overwrite")
        assert code == 0 and same(outcome(out), whole[1]), printed


def test_resume_starts_from_the_weights_that_the_run_began_with(whole, tmp_path):
    """Without SFT too: the file behind --init may have changed in the meantime."""
    flags = [flag for flag in TINY[4:] if flag not in ("--tokenizer", "toy")]
    flags += ["--init", str(tmp_path / "init.pt"), "--sft_steps", "0", "--out"]
    shutil.copy(whole[0] / "sft.pt", tmp_path / "init.pt")
    train.main([*flags, str(tmp_path / "a")])
    out = tmp_path / "b"
    process = start(*flags, out)
    wait_for(process, out, "DPO      4/40")
    process.kill()
    process.join()
    shutil.copy(whole[0] / "dpo.pt", tmp_path / "init.pt")
    train.main([*flags, str(out), "--resume"])
    assert same(outcome(tmp_path / "a"), outcome(out))


def test_resume_with_another_network_behind_init_is_refused(tmp_path, capsys):
    """The same weights with other heads are another network."""
    model = GPT(GPTConfig(data.toy_tokenizer().n_vocab, n_head=2, n_embd=16, tokenizer="toy"))
    model.save(tmp_path / "init.pt")
    flags = [flag for flag in TINY[4:] if flag not in ("--tokenizer", "toy")] + ["--init", str(tmp_path / "init.pt"), "--sft_steps", "1", "--steps", "1"]
    train.main([*flags, "--out", str(tmp_path / "out")])
    model.config.n_head = 4
    model.save(tmp_path / "init.pt")
    assert "n_head was 2, now it is 4" in refused(*flags, "--out", tmp_path / "out", "--resume", capsys=capsys)


@pytest.mark.parametrize("name, value, before", [
    ("beta", 0.5, 1.0), ("seed", 1, 0), ("steps", 41, 40), ("sft_steps", 41, 40), ("n_embd", 32, 16), ("n_layer", 2, 1), ("n_head", 2, 4),
    ("learning_rate", 0.01, 0.001), ("sft_learning_rate", 0.01, 0.004), ("dtype", "bfloat16", "float32"), ("held_out", 0.2, 0.1),
    ("block_size", 200, 256), ("batch_size", 5, 4), ("grad_accum", 2, 1), ("label_smoothing", 0.1, 0.0), ("n_pairs", 9, 32768), ("n_reviews", 9, 20000)])
def test_resume_with_another_setting_is_refused_with_both_values(copied, capsys, name, value, before):
    error = refused(*TINY, f"--{name}", value, "--out", copied, "--resume", capsys=capsys)
    assert error == f"error: {copied}/state.pt: {name} was {before}, now it is {value}\n"


def test_resume_compares_every_setting_but_five(copied):
    """device is alike on every machine that has only a CPU; init and tokenizer are compared as the others are."""
    saved = load_checkpoint(copied / "state.pt")["settings"]
    names = {f.name for f in train.fields(train.Config)}
    assert names - saved.keys() == {"data", "out", "save_every", "resume", "overwrite"}


def test_resume_with_other_pairs_is_refused_and_with_a_moved_file_it_continues(whole, copied, tmp_path, capsys):
    """The checksum covers the ids of every prompt, chosen and rejected completion, of held-out pairs too, and their lengths."""
    text, tokenizer = open(PAIRS).read(), data.toy_tokenizer()
    held_out = data.split_pairs(data.encode_pairs(data.read_jsonl(PAIRS), tokenizer, 256)[0], 0.1, 256, seed=0)[1][0]
    rejected = tokenizer.decode(held_out.rejected[:-1])
    for old, new in ((" depends", " hinges"), ("Eight", "Seven"), ("boil an", "cook an"), (rejected, rejected + "!"),
                     ('A:", "chosen": " Eight', 'A", "chosen": ": Eight')):  # the last one has the same ids in a row
        assert old in text
        (tmp_path / "changed.jsonl").write_text(text.replace(old, new, 1))
        error = refused(*TINY, "--data", tmp_path / "changed.jsonl", "--out", copied, "--resume", capsys=capsys)
        assert "state.pt: checksum of the pairs in --data was " in error, new
    shutil.copy(PAIRS, tmp_path / "moved.jsonl")
    moved = copied.rename(tmp_path / "elsewhere")
    train.main([*TINY, "--data", str(tmp_path / "moved.jsonl"), "--save_every", "9", "--out", str(moved), "--resume"])
    assert same(outcome(moved), whole[1])


def test_resume_without_a_good_state_is_refused(whole, copied, capsys):
    (copied / "state.pt").unlink()
    assert f"error: {copied}/state.pt: No such file or directory\n" == refused(*TINY, "--out", copied, "--resume", capsys=capsys)
    state = (whole[0] / "state.pt").read_bytes()
    (copied / "state.pt").write_bytes((copied / "sft.pt").read_bytes())
    assert "state.pt: held_out was None, now it is 0.1" in refused(*TINY, "--out", copied, "--resume", capsys=capsys)
    for wrong in (b"", b"rubbish", state[:-99], state[:9000] + bytes(99) + state[9099:]):
        (copied / "state.pt").write_bytes(wrong)
        assert "state.pt: " in refused(*TINY, "--out", copied, "--resume", capsys=capsys)


def test_metrics_are_cut_to_the_saved_length_and_shorter_or_missing_ones_are_appended_to(whole, copied):
    with open(copied / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "DPO", "st')
    train.main([*TINY, "--out", str(copied), "--resume"])
    assert same(outcome(copied), whole[1])
    content = (copied / "metrics.jsonl").read_bytes()
    report = content.splitlines(keepends=True)[-1]
    (copied / "metrics.jsonl").write_bytes(content[:1000])
    train.main([*TINY, "--out", str(copied), "--resume"])
    assert (copied / "metrics.jsonl").read_bytes() == content[:1000] + report
    (copied / "metrics.jsonl").unlink()
    train.main([*TINY, "--out", str(copied), "--resume"])
    assert (copied / "metrics.jsonl").read_bytes() == report


def test_a_loss_that_is_not_finite_is_one_line_and_the_last_state_stays(whole, tmp_path, capsys, monkeypatch):
    out, dpo_loss = tmp_path / "out", train.dpo_loss
    calls = iter(range(100))
    def diverging(*arguments, **options):
        losses, *rewards = dpo_loss(*arguments, **options)
        return losses * (float("inf") if next(calls) == 20 else 1), *rewards
    monkeypatch.setattr(train, "dpo_loss", diverging)
    message = r"^DPO step 11: loss inf, norm of the gradient .*; is the learning rate 0.001 too high\? Start again with another --out$"
    with pytest.raises(FloatingPointError, match=message):
        train.main([*TINY, "--out", str(out)])
    state, lines = load_checkpoint(out / "state.pt"), (out / "metrics.jsonl").read_text().splitlines()
    assert state["DPO"][0] == 7 and not (out / "dpo.pt").exists()
    assert all(torch.equal(p, whole[1][1][0][name]) for name, p in GPT.load(out / "sft.pt").state_dict().items())
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)
    monkeypatch.undo()
    train.main([*TINY, "--out", str(out), "--resume"])
    assert same(outcome(out), whole[1])


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


def test_200_corrupted_checkpoints_are_refused_or_load_the_same_weights(tmp_path, capsys):
    torch.manual_seed(0)
    model, rng, outcomes, buffer = GPT(GPTConfig(20, 16, 1, 1, 8)), np.random.default_rng(0), [], io.BytesIO()
    torch.save({"weights": model.to_gpt2(), "n_head": 1, "tokenizer": ""}, buffer)
    for _ in range(200):
        (tmp_path / "c.pt").write_bytes(corrupt(buffer.getvalue(), rng))
        try:
            loaded = GPT.load(tmp_path / "c.pt")
        except ValueError as error:
            assert "\n" not in str(error) and "c.pt: " in str(error)
            outcomes.append("refused")
        else:
            assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())
            outcomes.append("harmless")
    assert outcomes.count("refused") > 130


def test_a_checkpoint_with_code_is_refused_and_the_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"weights": Code()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: not a checkpoint of tensors, or damaged"):
        GPT.load(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_400_corrupted_files_of_pairs_are_read_or_refused_in_one_line(tmp_path):
    rng, path, refused = np.random.default_rng(0), tmp_path / "p.jsonl", 0
    with open(PAIRS, "rb") as file:
        content = b"".join(file.readlines()[:12])
    tokenizer = data.toy_tokenizer()
    for _ in range(400):
        path.write_bytes(corrupt(content, rng))
        try:
            data.split_pairs(data.encode_pairs(data.read_jsonl(path), tokenizer, 256)[0], 0.1, 256, seed=0)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{path}:")
            refused += 1
    assert 200 < refused < 400


def test_on_a_full_disk_the_last_state_stays(whole, tmp_path):
    out = tmp_path / "out"
    process = start(*TINY, "--out", out)
    wait_for(process, out, "SFT   ")
    process.kill()
    process.join()
    before = (out / "state.pt").read_bytes()
    code, printed = finish(*TINY, "--out", out, "--resume", limit=len(before) - 1)
    assert code == 2 and "error: " in printed.splitlines()[-1] and "Traceback" not in printed
    assert (out / "state.pt").read_bytes() == before
    assert finish(*TINY, "--out", out, "--resume")[0] == 0 and same(outcome(out), whole[1])


def test_wherever_the_disk_becomes_full_the_old_file_stays(tmp_path):
    """Even if only the last byte does not fit. torch 2.6 does not notice that by itself."""
    import resource
    path, (soft, hard) = tmp_path / "c.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(path, {"weights": torch.ones(3000)})
    old = path.read_bytes()
    for limit in (0, 1, 100, len(old) // 2, *range(len(old) - 300, len(old), 7), len(old) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="c.pt cannot be written; is the disk full?"):
                save_checkpoint(path, {"weights": torch.zeros(3000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == old


def test_a_terminal_without_greek_letters_gets_the_whole_report(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--out", str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    terminal.flush()
    assert b"KL(???_ref) from " in terminal.buffer.getvalue()
