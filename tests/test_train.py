"""train.py: settings, the training loop, the stages, the two tasks and their reports."""
import copy
import gc
import itertools
import json
import math
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import train
from dpo import dpo_loss, sequence_logps
from model import GPT, GPTConfig, load_checkpoint
from tests.conftest import ROOT
from train import Config

PAIRS = str(ROOT / "tests" / "pairs.jsonl")
TOKENIZER = data.toy_tokenizer()
TINY = "--n_layer 1 --n_embd 16 --sft_steps 3 --steps 3 --n_pairs 100 --n_reviews 100 --batch_size 8 --device cpu".split()
OWN = [*TINY, "--data", PAIRS, "--tokenizer", "toy"]
LN2 = math.log(2)


def start(*arguments, folder=ROOT, **options):
    return subprocess.Popen([sys.executable, folder / "train.py", *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8", **options)


def read_metrics(folder):
    with open(folder / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def stage_metrics(folder, stage="DPO"):
    return [m for m in read_metrics(folder) if m.get("stage") == stage]


def tiny_model(**shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(TOKENIZER.n_vocab, **{"n_layer": 1, "n_head": 2, "n_embd": 16} | shape))


def tiny_pairs(n=12):
    """Pairs of different lengths, as ids."""
    rng, prompts = np.random.default_rng(0), data.toy_prompts()[0]
    drawn = [data.toy_reviews(prompts[:1], n, rng) for _ in range(2)]
    return [data.Pair(*data.encode(TOKENIZER, x, y_w), data.encode_completion(TOKENIZER, y_l))
            for (x, y_w), (_, y_l) in zip(*drawn, strict=True)]


def train_dpo(policy, scored_pairs, cfg):
    """A plain loop around train_step. Yields the metrics of each step."""
    optimizer, batches = train.make_optimizer(policy), data.batches(scored_pairs, cfg.batch_size, cfg.seed)
    for step in range(1, cfg.steps + 1):
        optimizer.param_groups[0]["lr"] = train.warmup_cosine(step, cfg.steps, cfg.learning_rate)
        yield train.train_step(policy, optimizer, next(batches), train.dpo_objective, cfg)


# The whole pipeline


def test_a_small_run_comes_close_to_the_optimum(small):
    """Seeds 0 to 9 give: SFT's reward .37 to .46, DPO's 3.87 to 4.08, share .932 to .979, KL to the optimum .044 to .143,
    well-formed .989 to .997, win rate .890 to .904, correlation .992 to .995, accuracy / best .993 to .994, sampled KL at most
    2.2 errors away; distances from the optimum: margin .25, loss .03, Δ chosen .27, Δ rejected .52."""
    process, out = small
    assert process.returncode == 0 and process.stderr == "", process.stderr
    report = {name.removeprefix("report/"): value for name, value in read_metrics(out)[-1].items()}
    assert set(report) == {"objective_share", "kl_to_optimum", "implicit_reward_correlation", "sampled_kl", "sampled_kl_error"} | {
        f"{row}/{figure}" for row in ("sft", "dpo", "optimum") for figure in data.FIGURES}
    assert 0.25 < report["sft/reward"] < 0.6 and 3.6 < report["dpo/reward"] < 4.3
    assert abs(report["sampled_kl"] - report["dpo/kl"]) < 4 * report["sampled_kl_error"] < 4  # the estimate agrees with the exact KL
    assert 0.9 < report["objective_share"] < 1 and 0 < report["kl_to_optimum"] < 0.22
    assert report["dpo/valid"] > 0.98 and report["dpo/win_rate"] > 0.87 and report["implicit_reward_correlation"] > 0.985
    assert 0.985 < report["dpo/accuracy"] / report["optimum/accuracy"] < 1
    for figure, distance in (("margin", 0.4), ("loss", 0.05), ("chosen_change", 0.5), ("rejected_change", 0.8)):
        assert report[f"dpo/{figure}"] == pytest.approx(report[f"optimum/{figure}"], abs=distance)
    assert report["optimum/chosen_change"] < 0  # at the optimum, log π(chosen) is lower than at the start


def test_metrics_hold_every_step_and_ten_evaluations(small):
    sft, dpo = stage_metrics(small[1], "SFT"), stage_metrics(small[1])
    assert [m["step"] for m in sft] == list(range(1, 501)) and [m["step"] for m in dpo] == list(range(1, 401))
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert set(sft[0]) == {"stage", "step", "loss", "nats_per_token"} and set(dpo[0]) == {"stage", "step"} | names
    evaluated = [m for m in dpo if "eval/loss" in m]
    assert [m["step"] for m in evaluated] == list(range(40, 401, 40))
    assert all({f"eval/{name}" for name in names} <= set(m) for m in evaluated)
    assert dpo[0]["loss"] == pytest.approx(LN2, abs=1e-5) and dpo[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert sft[0]["nats_per_token"] == pytest.approx(math.log(299), rel=0.1)  # of 299 tokens; reviews have 2 to 4
    assert 2 < sft[0]["loss"] / sft[0]["nats_per_token"] < 4


def test_printed_rows_are_the_means_of_each_tenth_in_80_columns(small):
    lines = small[0].stdout.splitlines()
    assert max(map(len, lines)) <= 80
    headers = [line for line in lines if line.split()[:1] == ["step"]]
    assert [line.split() for line in headers] == [["step", "loss", "nats/tok", "ETA"], [
        "step", "loss", "accuracy", "margin", "chosen", "rejected", "held-out", "accuracy", "ETA"]]
    first = lines[lines.index(headers[1]) + 1]
    ends = [match.end() for match in re.finditer(r"\S+", headers[1])]
    assert [match.end() for match in re.finditer(r"\S+", first[13:])][:7] == [end - 13 for end in ends[1:8]]  # right-aligned
    names = ["loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"]
    sft = [float(x) for x in lines[lines.index(headers[0]) + 3].split()[2:4]]
    assert sft == pytest.approx([np.mean([m[name] for m in stage_metrics(small[1], "SFT")[100:150]]) for name in ("loss", "nats_per_token")], abs=6e-4)
    rows = [line.split() for line in lines if line.startswith("DPO ")  and "/400" in line]
    assert len(rows) == 10
    for k, row in enumerate(rows):
        tenth = stage_metrics(small[1])[40 * k:40 * (k + 1)]
        means = [np.mean([m[name] for m in tenth]) for name in names]
        means += [tenth[-1]["eval/loss"], tenth[-1]["eval/rewards/accuracies"]]
        assert row[1] == f"{40 * (k + 1)}/400" and [float(x) for x in row[2:9]] == pytest.approx(means, abs=6e-4)


def exact_rows(out, beta=1.0):
    """Log-probabilities of all outcomes under both saved models, with a naive loop for the first review."""
    prompts, cfg = data.toy_prompts()[1], Config(device="cpu")
    models = [GPT.load(out / name) for name in ("sft.pt", "dpo.pt")]
    logps = [train.outcome_logps(model, prompts, cfg, TOKENIZER) for model in models]
    x, y = data.encode(TOKENIZER, prompts[0], data.REVIEWS[500])
    for model, rows in zip(models, logps, strict=True):
        naive = sum(model(torch.tensor([x + y[:t]]))[0, -1].log_softmax(-1)[y[t]].item() for t in range(len(y)))
        assert rows[0, 500].item() == pytest.approx(naive, abs=1e-4)
        assert rows.exp().sum(-1).tolist() == pytest.approx([1] * 20)
    return prompts, logps


def test_the_printed_report_of_the_toy_task_follows_from_the_saved_models(small):
    text, out = small[0].stdout, small[1]
    prompts, (sft, dpo) = exact_rows(out)
    rewards = data.outcome_rewards(prompts)
    columns = {"SFT": sft, "DPO": dpo, "OPTIMUM": (sft + rewards).log_softmax(-1)}
    labels = {"objective E[r] - β KL": "objective", "E[r]": "reward", "KL(π‖π_ref), nats": "kl", "P(well-formed)": "valid",
              "win rate against SFT": "win_rate", "preference accuracy": "accuracy", "implicit reward margin": "margin",
              "DPO loss, nats": "loss", "Δ log π(chosen), nats": "chosen_change", "Δ log π(rejected), nats": "rejected_change"}
    table = text[text.index("20 held-out prompts, exact"):].splitlines()
    assert table[0].split()[-3:] == list(columns)
    figures = [data.exact_figures(logps, sft, rewards, 1.0) for logps in columns.values()]
    for line, (label, key) in zip(table[1:11], labels.items(), strict=True):
        assert line.startswith(f"{label:28} ") and [float(x) for x in line.split()[-3:]] == pytest.approx([f[key] for f in figures], abs=1e-3)
    start, reached, best = (f["objective"] for f in figures)
    share = float(re.search(r"DPO achieves ([\d.]+)% of the achievable improvement", text)[1])
    assert share == pytest.approx(100 * (reached - start) / (best - start), abs=0.1)
    kl = float(re.search(r"KL\(π‖π\*\) is ([\d.]+) nats", text)[1])
    assert kl == pytest.approx((dpo.exp() * (dpo - columns["OPTIMUM"])).sum(-1).mean().item(), abs=1e-3)
    correlations = [np.corrcoef((dpo - sft)[i, :-1], rewards[i, :-1])[0, 1] for i in range(20)]
    assert float(re.search(r"correlation of ([\d.]+)\.", text)[1]) == pytest.approx(np.mean(correlations), abs=1e-3)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on the 200 pairs of the tests: (what it printed, its folder)."""
    out = tmp_path_factory.mktemp("own") / "out"
    process = start("--data", PAIRS, "--tokenizer", "toy", "--sft_steps", 60, "--steps", 30, "--batch_size", 32, "--held_out", 0.2,
                    "--learning_rate", 3e-4, "--device", "cpu", "--out", out)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed, out


def samples_in(text):
    """{prompt: (SFT's sample, DPO's sample)} as printed."""
    found = re.findall(r"\n('.*|\".*)\n    SFT (.*)\n    DPO (.*)\n", text)
    return {prompt: samples for prompt, *samples in found}


def test_printed_samples_of_the_toy_task_are_those_of_the_saved_models_on_held_out_prompts(small):
    held_out = [TOKENIZER.encode_ordinary(x) for x in data.toy_prompts()[1]]
    check_samples(small[0].stdout, small[1], held_out, 4)


def test_printed_samples_on_own_pairs_are_those_of_the_saved_models_on_held_out_prompts(own):
    pairs = data.encode_pairs(data.read_jsonl(PAIRS), TOKENIZER, 256)[0]
    held_out = dict.fromkeys(tuple(pair.prompt) for pair in data.split_pairs(pairs, 0.2, 256, 0)[1])
    check_samples(*own, [list(ids) for ids in held_out][:32], 128)


def check_samples(text, out, held_out, n):
    """The printed samples, lengths, shares with EOS and KL of a run, each computed again from its models."""
    models, cfg = [GPT.load(out / file) for file in ("sft.pt", "dpo.pt")], Config(device="cpu")
    completions = [train.sample(model, held_out, n, cfg, TOKENIZER) for model in models]
    expected = {f"{TOKENIZER.decode(x)!r:.80}": [f"{data.decode(TOKENIZER, ys[i])!r:.71}" for ys in completions]
                for i, x in enumerate(held_out[:4])}
    assert samples_in(text) == expected and len({y for ys in expected.values() for y in ys}) > 4
    for label, ys in zip(("SFT", "DPO"), completions, strict=True):
        length, ended = re.search(rf"\n    {label} +([\d.]+) +([\d.]+)\n", text).groups()
        assert float(length) == pytest.approx(np.mean([len(y) for y in ys]), abs=0.051)
        assert float(ended) == pytest.approx(np.mean([y[-1] == TOKENIZER.eot_token for y in ys]), abs=0.0051)
    rows = [data.Row(x, y) for x, y in zip(held_out, completions[1], strict=True)]
    ratios = (train.score(models[1], rows, cfg) - train.score(models[0], rows, cfg)).numpy()
    kl, error = re.search(r"KL\(π‖π_ref\) from the samples of DPO: (\S+) ± (\S+) nats", text).groups()
    assert [float(kl), float(error)] == pytest.approx([ratios.mean(), ratios.std(ddof=1) / len(ratios) ** 0.5], abs=2e-3)


def test_the_evaluation_of_held_out_pairs_follows_from_the_saved_models(own):
    """Each figure of the last step is computed again, from held-out rows that are scored one at a time."""
    text, out = own
    pairs = data.split_pairs(data.encode_pairs(data.read_jsonl(PAIRS), TOKENIZER, 256)[0], 0.2, 256, 0)[1]
    logps = {}
    for name in ("sft", "dpo"):
        model = GPT.load(out / f"{name}.pt")
        for side in ("chosen", "rejected"):
            batches = [data.collate([data.Row(pair.prompt, getattr(pair, side))]) for pair in pairs]
            logps[name, side] = np.array([sequence_logps(model(tokens), tokens, mask).item() for tokens, mask in batches])
    chosen, rejected = (logps["dpo", side] - logps["sft", side] for side in ("chosen", "rejected"))
    expected = {"loss": np.log1p(np.exp(rejected - chosen)), "rewards/chosen": chosen, "rewards/rejected": rejected,
                "rewards/accuracies": chosen > rejected, "rewards/margins": chosen - rejected,
                "logps/chosen": logps["dpo", "chosen"], "logps/rejected": logps["dpo", "rejected"]}
    last = stage_metrics(out)[-1]
    assert {name: last[f"eval/{name}"] for name in expected} == pytest.approx({name: x.mean() for name, x in expected.items()}, abs=1e-3)
    assert expected["rewards/accuracies"].mean() > 0.8 and expected["loss"].mean() < 0.6  # it has learned
    assert text.splitlines()[:5] == [f"       200 pairs in {PAIRS}", f"{200 - len(pairs):10} to train on", f"{len(pairs):10} held out (--held_out 0.2)",
                                     "mean length: chosen 28.3, rejected 65.6 tokens", "β 1, learning rates 0.004 (SFT) and 0.0003 (DPO), float32 on cpu, seed 0"]


def test_printed_pairs_are_the_first_two_of_the_file_with_chosen_and_rejected_as_in_it(own):
    with open(PAIRS) as file:
        records = [json.loads(line) for line in file]
    found = re.findall(r"\n'(.*)'\n    chosen   '(.*)\n    rejected '(.*)", own[0])
    assert len(found) == 2
    for prompt, chosen, rejected in found:
        [record] = [r for r in records if r["prompt"] == prompt and r["chosen"] in chosen]
        assert chosen == f"{record['chosen']}'"[:66] and rejected == f"{record['rejected']}'"[:66]


def test_each_setting_changes_what_it_names_and_nothing_before(tmp_path, monkeypatch, capsys):
    """The pipeline's results, in order: weights, SFT's rows, SFT's losses, pairs, DPO's losses."""
    seen, train_stage = [], train.train_stage
    def watched(run, stage, model, examples, *rest, **named):
        seen.append([p.sum().item() for p in model.parameters()] if stage == "SFT" else [])
        seen.append([[list(ids) for ids in example[:3]] for example in examples])
        train_stage(run, stage, model, examples, *rest, **named)
    monkeypatch.setattr(train, "train_stage", watched)
    monkeypatch.setattr(train, "report_exactly", lambda *_: {})
    def results(*change):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        seen.clear()
        train.main([*TINY, "--block_size", "64", "--out", str(out), *change])
        weights, rows, _, pairs = seen
        losses = [[m["loss"] for m in stage_metrics(out, stage)] for stage in ("SFT", "DPO")]
        return [weights, rows, losses[0], pairs, losses[1]]
    WEIGHTS, ROWS, SFT, SAMPLED, DPO = range(5)
    usual = results()
    assert results() == usual
    for name, value, first in (
            ("n_layer", 2, WEIGHTS), ("n_embd", 32, WEIGHTS), ("block_size", 65, WEIGHTS), ("n_reviews", 90, ROWS), ("n_head", 2, SFT), ("sft_steps", 4, SFT),
            ("sft_learning_rate", 1e-3, SFT), ("batch_size", 9, SFT), ("dtype", "bfloat16", SFT), ("n_pairs", 90, SAMPLED), ("steps", 4, DPO),
            ("learning_rate", 1e-2, DPO), ("beta", 2.0, DPO), ("label_smoothing", 0.2, DPO)):
        differs = [a != b for a, b in zip(usual, results(f"--{name}", str(value)), strict=True)]
        assert any(differs) and differs.index(True) == first, (name, differs)


@pytest.fixture
def model_file(tmp_path):
    tiny_model(tokenizer="toy").save(tmp_path / "init.pt")
    return str(tmp_path / "init.pt")


def test_with_a_fixed_model_the_seed_changes_rows_labels_batches_split_and_samples(model_file, tmp_path, monkeypatch, capsys):
    """Without SFT the weights are those of --init, so that each difference is one of the data."""
    def results(seed, *flags):
        out, seen = tmp_path / f"{len(list(tmp_path.iterdir()))}", {"batches": []}
        objective = train.dpo_objective
        def watched(policy, pairs, cfg):
            seen["batches"].append([tuple(map(int, p.prompt + p.chosen)) if isinstance(p.prompt, list) else tuple(p.chosen.tolist()) for p in pairs])
            return objective(policy, pairs, cfg)
        monkeypatch.setattr(train, "dpo_objective", watched)
        monkeypatch.setattr(train, "report_exactly", lambda *_: {})
        train.main([*TINY[6:], *flags, "--init", model_file, "--sft_steps", "0", "--steps", "2", "--seed", str(seed), "--out", str(out)])
        monkeypatch.undo()
        return {"batches": seen["batches"], "SFT's samples": re.findall("^    SFT '.*", capsys.readouterr().out, re.M)}
    for flags in ([], ["--data", PAIRS], ["--data", PAIRS, "--held_out", "0"]):  # the last one has no split
        first, again, other = results(0, *flags), results(0, *flags), results(1, *flags)
        assert first == again and all(first[name] != other[name] for name in first), flags
    pairs = data.encode_pairs(data.read_jsonl(PAIRS), TOKENIZER, 256)[0]
    cfgs = [Config(seed=seed, data=PAIRS, tokenizer="toy", device="cpu") for seed in (0, 1)]
    splits = [{tuple(p.prompt) for p in train.FileTask(cfg, tiny_model()).held_out_pairs} for cfg in cfgs]
    assert splits[0] != splits[1] and len(splits[0]) == len(splits[1]) and len(pairs) == 200
    both = [data.encode_completion(TOKENIZER, y) for y in (" dull", " slow")]
    class Fixed:
        def sample(self, prompt_ids, *_):
            return [both[2 * i // len(prompt_ids)] for i in range(len(prompt_ids))]
    monkeypatch.setattr(train, "MAX_TOKENS", 10**6)  # one batch
    labelled = [train.make_pairs(Fixed(), data.toy_prompts()[0], 201, Config(seed=seed, device="cpu"), TOKENIZER) for seed in (0, 1)]
    assert len(labelled[0]) == 201 and labelled[0] != labelled[1]
    rows = [train.ToyTask(Config(seed=seed, device="cpu", n_reviews=50)).sft_rows() for seed in (0, 1)]
    assert rows[0] != rows[1]


def test_sampling_uses_temperature_1_and_one_generator_for_all_batches(monkeypatch):
    """Equal prompts in different batches get different samples. Frequencies are the model's probabilities."""
    monkeypatch.setattr(train, "MAX_TOKENS", 100)
    model, cfg = tiny_model(n_embd=8), Config(device="cpu")
    with torch.no_grad():
        model.wte.weight[:] = 0.7 * torch.randn(model.wte.weight.shape, generator=torch.Generator().manual_seed(1))
    probabilities = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
    drawn = [y[0] for y in train.sample(model, [[1, 2]] * 4000, 1, cfg, TOKENIZER)]
    assert 1 < len(set(drawn)) and drawn[:33] != drawn[33:66]  # 33 rows are a batch
    top = probabilities.argmax().item()
    p = probabilities[top].item()
    assert 0.05 < p < 0.95 and abs(np.mean([y == top for y in drawn]) - p) < 4 * (p * (1 - p) / 4000) ** 0.5
    warm = (model(torch.tensor([[1, 2]]))[0, -1] / 0.8).softmax(-1)[top].item()
    assert abs(warm - p) > 8 * (p * (1 - p) / 4000) ** 0.5  # temperature .8 would be noticed


def test_grad_accum_splits_each_batch_and_the_evaluation(tmp_path, monkeypatch):
    sizes, objectives = [], {name: getattr(train, name) for name in ("sft_objective", "dpo_objective")}
    for name, objective in objectives.items():
        monkeypatch.setattr(train, name, lambda model, examples, cfg, objective=objective: sizes.append(len(examples)) or objective(model, examples, cfg))
    train.main([*OWN, "--steps", "1", "--sft_steps", "1", "--batch_size", "8", "--grad_accum", "3", "--out", str(tmp_path / "out")])
    held_out = 200 - 182
    assert sizes == [3, 3, 2] + [3, 3, 2] + [3] * (held_out // 3)


def test_a_state_is_saved_when_the_folder_is_opened_before_each_stage_and_every_save_every_steps(tmp_path, monkeypatch):
    saved, save_checkpoint = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda path, content: saved.append(
        {stage: content[stage][0] for stage in ("SFT", "DPO") if stage in content}) or save_checkpoint(path, content))
    train.main([*OWN, "--sft_steps", "5", "--steps", "7", "--save_every", "3", "--out", str(tmp_path / "out")])
    assert saved == [{}] + [{"SFT": n} for n in (0, 3, 5)] + [{"SFT": 5, "DPO": n} for n in (0, 3, 6, 7)]


def test_the_time_left_counts_the_steps_of_this_run_alone(tmp_path, monkeypatch, capsys):
    """A clock that ticks once per step: after 15 of 30 steps 15 s are left, also if the run was resumed at step 10."""
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    train_step = train.train_step
    def ticking(*arguments):
        now[0] += 1
        if now[0] == 13 and first:
            raise KeyboardInterrupt
        return train_step(*arguments)
    monkeypatch.setattr(train, "train_step", ticking)
    flags = [*OWN, "--sft_steps", "0", "--steps", "30", "--save_every", "10", "--out", str(tmp_path / "out")]
    first = True
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    first = False
    train.main([*flags, "--resume"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("DPO ")]
    assert [(row[1], row[-1]) for row in rows] == [(f"{n}/30", f"{30 - n}s") for n in (3, 6, 9, 12, 12, 15, 18, 21, 24, 27, 30)]


# The command line


@pytest.mark.parametrize("name, low, high, wrong", [
    ("beta", 1e-6, None, [0, -1]), ("label_smoothing", 0, 0.49, [-0.1, 0.5]), ("learning_rate", 1e-9, None, [0, -1]), ("sft_learning_rate", 1e-9, None, [0]),
    ("held_out", 0, 0.9, [-0.1, 1]), ("steps", 1, None, [0]), ("sft_steps", 0, None, [-1]), ("batch_size", 1, None, [0, -3]), ("grad_accum", 1, None, [0]),
    ("n_layer", 1, None, [0]), ("n_head", 1, None, [0]), ("n_embd", 1, None, [0]), ("block_size", 16, None, [15]), ("n_pairs", 1, None, [0]),
    ("n_reviews", 1, None, [0]), ("seed", 0, 2**32 - 1, [-1, 2**32]), ("save_every", 1, None, [0])])
def test_a_setting_out_of_its_range_is_refused_by_name(name, low, high, wrong):
    limits = re.escape(f"at least {low}" if high is None else f"from {low} to {high}")
    kind = {f.name: f.type for f in train.fields(Config)}[name]
    for value in [*wrong, *(["inf", "nan", "-inf"] if kind is float else [])]:
        with pytest.raises(ValueError, match=rf"^--{name}: expected a finite number {limits}, got "):
            train.parse_settings([f"--{name}={value}"])
    for value in (low, kind(10**12) if high is None else high):
        assert getattr(train.parse_settings([f"--{name}", str(value)]), name) == value


@pytest.mark.parametrize("arguments, message", [
    (["--beta", "0"], "--beta: expected a finite number at least 1e-06, got 0.0"),
    (["--n_head", 3], "expected an integer n_head that divides n_embd = 64, got 3"),
    (["--beta", "x"], "argument --beta: invalid float value: 'x'"), (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    (["--stepz", "3"], "unrecognized arguments: --stepz 3"), (["--ste", "3"], "unrecognized arguments: --ste 3"),
    (["--data", "nope.jsonl", "--tokenizer", "toy"], "nope.jsonl: No such file or directory"),
    (["--data", "", "--tokenizer", "toy"], "an empty path: No such file or directory"),
    (["--init", "nope.pt"], "nope.pt: expected a file, such as out/sft.pt or pytorch_model.bin"),
    (["--init", "tests"], "tests: expected a file, such as out/sft.pt or pytorch_model.bin"),
    (["--init", ""], ": expected a file, such as out/sft.pt or pytorch_model.bin"),
    (["--out", __file__], f"--out {__file__}: expected a folder, got a file"), (["--out", ""], "--out: expected a folder, got an empty path"),
    (["--out", "{out}/link"], "--out {out}/link: expected a folder, got a link to nothing"),
    (["--tokenizer", "gpt2"], "the toy task needs the tokenizer toy; give your pairs with --data"),
    (["--data", PAIRS, "--tokenizer", "toy", "--out", __file__ + "/x"], f"{__file__}/x: Not a directory"),
    (["--resume", "--overwrite"], "--resume continues a run and --overwrite deletes it: choose one"),
    (["--resume"], "{out}/out/state.pt: No such file or directory")])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: TOKENIZER)  # no download
    arguments = [str(a).replace("{out}", str(tmp_path)) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        train.main(arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path / "out")])
    message = message.replace("{out}", str(tmp_path))
    assert stop.value.code == 2 and capsys.readouterr().err.replace("'", "") == f"error: {message}\n".replace("'", "")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("place", ["completion_logps", "sample"])
def test_out_of_gpu_memory_is_one_line_that_does_not_advise_overwrite(tmp_path, place, monkeypatch, capsys):
    """In training and in the report, by a function that fails as on a GPU."""
    end = '\nif __name__ == "__main__":'
    full = f'\ndef {place}(*_, **__):\n    raise torch.OutOfMemoryError("CUDA out of memory")\n'
    (tmp_path / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8").replace(end, full + end), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train.py", *OWN, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "stdout", None)  # which train.py would reconfigure
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: out of GPU memory: raise --grad_accum or lower --block_size, and start again with another --out\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device {device}: torch does not find it"):
        Config(device=device)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    assert Config(device="mps").dtype == "float32"


def test_bfloat16_is_the_default_only_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
        assert Config(device="cuda").dtype == ("bfloat16" if native else "float32")
        assert Config(device="cuda", dtype="bfloat16").dtype == "bfloat16" and Config(device="cpu").dtype == "float32"


def test_help_shows_groups_and_a_default_for_each_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_settings(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 80
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "] == ["options", "data", "model", "SFT", "DPO", "run"]
    entries = re.split(r"\n  --", text)[1:]
    assert [entry.split()[0] for entry in entries] == [f.name for f in train.fields(Config)]
    for entry, f in zip(entries, train.fields(Config), strict=True):
        entry = " ".join(entry.split("\n\n")[0].split())
        assert f.metadata["help"] in entry and (f.name in ("init", "resume", "overwrite") or "(default: " in entry), f.name
        default = re.search(r"\(default: ([^,;)]+)", entry)
        if f.default is not None and default:
            assert default[1] == str(f.default)
        elif default and getattr(Config(device="cpu"), f.name) is not None and f.name not in ("tokenizer", "dtype"):
            assert float(default[1]) == getattr(Config(device="cpu"), f.name)  # what is typed into the help is so


def test_the_defaults_are_these_numbers():
    cfg, numbers = Config(device="cpu"), dict(
        held_out=0.1, tokenizer="toy", block_size=256, n_pairs=32768, n_reviews=20000, n_layer=1, n_head=4, n_embd=64, sft_steps=1000,
        sft_learning_rate=4e-3, steps=1000, learning_rate=1e-3, beta=1.0, label_smoothing=0.0, batch_size=64, grad_accum=1, seed=0, save_every=100)
    assert {name: getattr(cfg, name) for name in numbers} == numbers and cfg.out == "out" and cfg.dtype == "float32"
    assert (train.MAX_TOKENS, train.EVALUATED, data.MAX_NEW_TOKENS) == (4096, 256, 4) and Config(data="p.jsonl").tokenizer == "gpt2"


def test_defaults_with_init_are_the_papers_and_the_models():
    figures = lambda *arguments: [getattr(train.parse_settings(arguments), name) for name in ("beta", "learning_rate", "sft_learning_rate", "n_layer")]
    assert figures() == [1.0, 1e-3, 4e-3, 1] and figures("--init", "w.bin") == [0.1, 1e-6, 1e-5, None]
    assert figures("--init", "w.bin", "--beta", "1.0", "--sft_learning_rate", "2e-3", "--n_layer", "1") == [1.0, 1e-6, 2e-3, 1]


# The training loop


def test_weights_are_float32_and_their_decay_is_off(monkeypatch):
    """Under bfloat16 autocast, a step of 1e-6 moves nearly every weight. Weights in bfloat16 would not move."""
    cfg = Config(steps=1, batch_size=12, learning_rate=1e-6, dtype="bfloat16", device="cpu")
    sft = tiny_model()
    policy = copy.deepcopy(sft)
    list(train_dpo(policy, train.score_pairs(sft, tiny_pairs(), cfg), cfg))
    moved = (policy.h[0].mlp.c_fc.weight != sft.h[0].mlp.c_fc.weight).float().mean()
    assert moved > 0.9 and policy.wte.weight.dtype == torch.float32


def test_the_optimizer_is_adamw_with_the_stated_settings():
    optimizer = train.make_optimizer(tiny_model())
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 1
    assert {name: optimizer.defaults[name] for name in ("betas", "weight_decay", "fused")} == {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}


def test_the_learning_rate_warms_up_to_its_peak_and_falls_as_a_cosine():
    rates = [train.warmup_cosine(step, 100, 2.0) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)]) and max(rates) == rates[9] == 2
    assert rates[9 + 45] == pytest.approx(1, abs=0.02) and 0 < rates[99] < 0.001 and rates[9:] == sorted(rates[9:], reverse=True)
    assert all(0 < train.warmup_cosine(step, n, 2.0) <= 2 for n in (1, 2, 7) for step in range(1, n + 1))
    assert train.warmup_cosine(1, 1, 2.0) == 2


def line_steps(slopes, examples=(1, 2, 3, 4)):
    """One train_step with SGD at rate 1 on the loss slopes · weights: how far each weight moved."""
    model, slopes = torch.nn.Linear(len(slopes), 1, bias=False), torch.tensor(slopes)
    before = model.weight.detach().clone()
    objective = lambda model, examples, cfg: ((slopes * model.weight[0]).sum().expand(len(examples)), {})
    train.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), list(examples), objective, Config(device="cpu"))
    return (before - model.weight.detach())[0].tolist()


def test_a_gradient_longer_than_1_is_clipped_by_its_norm_and_a_shorter_one_is_not():
    assert line_steps([3.0, 4.0]) == pytest.approx([0.6, 0.8], rel=1e-5)  # by value it would be (1, 1)
    assert line_steps([300.0, -400.0]) == pytest.approx([0.6, -0.8], rel=1e-5)
    assert line_steps([0.3, 0.4]) == pytest.approx([0.3, 0.4], rel=1e-5)


def test_each_step_of_a_stage_uses_its_own_learning_rate(tmp_path, monkeypatch):
    rates, train_step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda model, optimizer, *rest: rates.append(
        optimizer.param_groups[0]["lr"]) or train_step(model, optimizer, *rest))
    train.main([*OWN, "--sft_steps", "5", "--steps", "30", "--learning_rate", "2e-3", "--out", str(tmp_path / "out")])
    assert rates == pytest.approx([train.warmup_cosine(step, 5, 4e-3) for step in range(1, 6)] + [train.warmup_cosine(step, 30, 2e-3) for step in range(1, 31)])


def test_train_step_returns_the_means_of_each_batch():
    """A gradient does not add to that of the step before: the weight falls by the mean, clipped at 1, times the rate."""
    model, cfg = torch.nn.Linear(1, 1, bias=False), Config(device="cpu", grad_accum=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    objective = lambda model, examples, cfg: (model.weight.sum() * torch.tensor(examples), {"square": torch.tensor(examples) ** 2})
    for batch, mean, square in (([1.0, 2.0, 3.0, 4.0], 2.5, 7.5), ([0.5, 0.6], 0.55, 0.305), ([0.3], 0.3, 0.09)):
        weight = model.weight.item()
        means = train.train_step(model, optimizer, batch, objective, cfg)
        assert means == pytest.approx({"loss": mean * weight, "square": square}, rel=1e-5)
        assert weight - model.weight.item() == pytest.approx(1e-3 * min(mean, 1), rel=1e-3)


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_change(loss, gradient):
    class Broken(torch.autograd.Function):
        forward = staticmethod(lambda context, x: x * 0 + loss)
        backward = staticmethod(lambda context, grad: grad * gradient)
    model = torch.nn.Linear(1, 1, bias=False)
    before, objective = model.weight.item(), lambda model, examples, cfg: (Broken.apply(model.weight[0]), {})
    with pytest.raises(FloatingPointError, match="^loss .*, norm of the gradient "):
        train.train_step(model, torch.optim.SGD(model.parameters(), lr=0.5), [1], objective, Config(device="cpu"))
    assert model.weight.item() == before


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 50])
@pytest.mark.parametrize("stage", ["SFT", "DPO"])
def test_accumulated_gradients_of_unequal_micro_batches_are_those_of_the_whole_batch(parts, stage):
    """Seven examples in micro-batches of 4 + 3, 3 + 3 + 1, … give one mean, and the same metrics."""
    sft, runs = tiny_model().double(), []
    scored = [p._replace(ref_chosen_logp=p.ref_chosen_logp + 0.1) for p in train.score_pairs(sft, tiny_pairs(7), Config(device="cpu"))]
    examples = scored if stage == "DPO" else [data.Row(p.prompt, p.chosen) for p in scored]
    objective = train.dpo_objective if stage == "DPO" else train.sft_objective
    for grad_accum in (1, parts):
        cfg, model, batches = Config(device="cpu", grad_accum=grad_accum), copy.deepcopy(sft), data.batches(examples, 7, 0)
        optimizer, results = torch.optim.SGD(model.parameters(), lr=1e-2), []
        for _ in range(3):
            metrics = train.train_step(model, optimizer, next(batches), objective, cfg)
            results.append((metrics, torch.cat([p.grad.flatten() for p in model.parameters()])))
        runs.append(results)
    for (whole, gradient), (accumulated, other) in zip(*runs, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-9, atol=1e-13) and gradient.norm() > 0.1
        assert whole == pytest.approx(accumulated, rel=1e-9)


def test_sft_sums_over_each_completion_whatever_else_is_in_its_batch():
    """-log π(y|x) in nats, alone or with shorter and longer rows. The prompt is not scored."""
    model, cfg = tiny_model(), Config(device="cpu")
    rows = [data.Row([1, 2, 3], [4, 298]), data.Row([1], [5, 6, 7, 8, 9, 10, 298]), data.Row([2, 2], [3] * 20 + [298])]
    logps = [model(torch.tensor([row.prompt + row.completion])).log_softmax(-1)[0] for row in rows]
    expected = [-sum(logp[len(x) + t - 1, y[t]].item() for t in range(len(y))) for logp, (x, y) in zip(logps, rows, strict=True)]
    for some in (slice(0, 3), slice(0, 2), slice(1, 3), slice(0, 1)):
        losses, metrics = train.sft_objective(model, rows[some], cfg)
        assert losses.tolist() == pytest.approx(expected[some], rel=1e-5) and losses.requires_grad
        per_token = [loss / len(row.completion) for loss, row in zip(expected[some], rows[some], strict=True)]
        assert metrics["nats_per_token"].tolist() == pytest.approx(per_token, rel=1e-5) and not metrics["nats_per_token"].requires_grad


def test_dpo_moves_the_policy_and_not_the_reference():
    """If they shared storage, the loss would stay at ln 2."""
    cfg, sft = Config(steps=2, batch_size=12, device="cpu"), tiny_model()
    before, policy = copy.deepcopy(sft.state_dict()), copy.deepcopy(sft)
    first, second = train_dpo(policy, train.score_pairs(sft, tiny_pairs(), cfg), cfg)
    assert first["loss"] == pytest.approx(LN2, abs=1e-5) and second["loss"] < first["loss"] - 1e-4
    assert all(torch.equal(before[name], p) for name, p in sft.state_dict().items())
    assert not torch.equal(policy.wte.weight, sft.wte.weight)


def test_the_dpo_objective_is_the_loss_of_each_pair_with_its_scores():
    """Compared with dpo_loss on rows that are scored one at a time; β and label smoothing come from the settings."""
    sft, policy, cfg = tiny_model(), tiny_model(n_embd=32), Config(device="cpu", beta=0.3, label_smoothing=0.2)
    pairs, logp = tiny_pairs(5), lambda model, x, y: train.completion_logps(model, [data.Row(x, y)], cfg).detach()
    scored = train.score_pairs(sft, pairs, cfg)
    four = [torch.cat([logp(model, p.prompt, getattr(p, side)) for p in pairs]) for model in (policy, sft) for side in ("chosen", "rejected")]
    assert [p.ref_chosen_logp for p in scored] == pytest.approx(four[2].tolist(), abs=1e-4)
    losses, metrics = train.dpo_objective(policy, scored, cfg)
    expected = dpo_loss(*four, 0.3, label_smoothing=0.2)
    assert torch.allclose(losses, expected[0], atol=1e-4) and losses.requires_grad
    assert torch.allclose(metrics["rewards/rejected"], expected[2], atol=1e-4) and torch.allclose(metrics["logps/chosen"], four[0], atol=1e-4)
    assert not any(values.requires_grad for values in metrics.values())
    for batch_size, grad_accum in ((64, 1), (2, 1), (5, 2)):  # one batch, 2 + 2 + 1, 3 + 2
        means = train.evaluate(policy, scored, train.replace(cfg, batch_size=batch_size, grad_accum=grad_accum))
        assert means == pytest.approx({"loss": losses.mean().item()} | {k: v.mean().item() for k, v in metrics.items()}, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_and_reference_under_the_same_autocast_start_at_ln_2(dtype):
    """Rows of one length give the same products in both passes. Rounding leaves at most 1e-4."""
    cfg, model = Config(dtype=dtype, device="cpu"), tiny_model()
    scored = train.score_pairs(model, tiny_pairs(), cfg)
    losses, _ = train.dpo_objective(model.train(), scored, cfg)
    assert losses.dtype == torch.float32 and (losses - LN2).abs().max() < 1e-4
    if dtype == "bfloat16":  # matrix products did run in bfloat16
        other = train.dpo_objective(model, train.score_pairs(model, tiny_pairs(), Config(device="cpu")), cfg)[0]
        assert (other - LN2).abs().max() > 1e-4


def test_scores_do_not_depend_on_the_batch_and_no_batch_is_too_large(monkeypatch):
    """Everything without gradient goes through score. A batch has at most MAX_TOKENS tokens, padding included."""
    cfg, model = Config(device="cpu"), tiny_model()
    rows = [data.Row(p.prompt, y) for p in tiny_pairs(24) for y in (p.chosen, p.rejected)] + [data.Row([1], [2] * 40)]
    alone = torch.cat([train.completion_logps(model, [row], cfg) for row in rows])
    sizes, completion_logps = [], train.completion_logps
    def watched(model, rows, cfg):
        sizes.append(len(rows) * max(map(data.length, rows)))
        return completion_logps(model, rows, cfg)
    monkeypatch.setattr(train, "completion_logps", watched)
    for tokens in (60, 2**13):
        monkeypatch.setattr(train, "MAX_TOKENS", tokens)
        logps = train.score(model, rows, cfg)
        assert torch.allclose(logps.float(), alone, atol=1e-5) and max(sizes) <= tokens and not logps.requires_grad
    assert sizes[0] == 41 and len(sizes) > 5 and logps.dtype == torch.float64 and train.score_pairs(model, [], cfg) == []


def test_long_scoring_and_sampling_print_a_line_of_progress(monkeypatch, capsys):
    clock = itertools.count(0, 11)
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(clock))  # every look at the clock is 11 seconds later
    monkeypatch.setattr(train, "MAX_TOKENS", 60)
    rows = [data.Row(p.prompt, p.chosen) for p in tiny_pairs(24)]
    train.score(tiny_model(), rows, Config(device="cpu"))
    train.sample(tiny_model(), [row.prompt for row in rows], 4, Config(device="cpu"), TOKENIZER)
    printed = capsys.readouterr().out
    assert re.search(r"^3 of \d batches scored\n", printed, re.M) and re.search(r"^3 of 5 batches sampled\n", printed, re.M)


def test_the_trajectory_of_a_small_run_is_the_recorded_one():
    """20 losses and gradient norms, recorded with torch 2.13.0 on an AMD EPYC (AVX2). With baseline kernels, and with torch
    2.6 and 2.14, no value differed by more than 1.6e-7, and no mean by more than 1.6e-8. The bars leave room for processors
    that were not measured, but a change of one step's rate by 1 % moves the values by more than 1e-4."""
    with open(ROOT / "tests" / "trajectory.json") as file:
        recorded = np.array(json.load(file))
    residuals = np.array(trajectory()) - recorded
    assert np.abs(residuals).max() < 1e-5 and np.abs(residuals.mean(0)).max() < 1e-6, residuals


def trajectory():
    """[[loss, norm of the gradient]] of 20 DPO steps."""
    cfg, sft = Config(steps=20, batch_size=8, device="cpu", beta=0.1, learning_rate=3e-3), tiny_model()
    policy = copy.deepcopy(sft)
    loop = train_dpo(policy, train.score_pairs(sft, tiny_pairs(32), cfg), cfg)
    norm = lambda: torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    return [[metrics["loss"], norm()] for metrics in loop]


# The two tasks


def test_bfloat16_reports_in_float32(tmp_path, monkeypatch):
    """Samples are drawn without autocast. Scored under autocast, they would be those of another policy."""
    used = []
    score = train.score
    monkeypatch.setattr(train, "score", lambda model, rows, cfg: used.append(cfg.dtype) or score(model, rows, cfg))
    monkeypatch.setattr(train, "report_exactly", lambda reference, policy, prompts, cfg, _: used.append(cfg.dtype) or {})
    train.main([*TINY, "--dtype", "bfloat16", "--out", str(tmp_path / "toy")])
    assert used[-3:] == ["float32"] * 3 and used[0] == "bfloat16"
    train.main([*OWN, "--dtype", "bfloat16", "--out", str(tmp_path / "own")])
    assert used[-2:] == ["float32"] * 2
    assert all(w.dtype == torch.float32 for w in load_checkpoint(tmp_path / "toy" / "dpo.pt")["weights"].values())


def test_after_sft_the_reference_is_frozen_and_its_gradients_and_optimizer_are_freed(tmp_path, monkeypatch):
    """At GPT-2's size each of them would be another copy of the weights. The state does not keep SFT's moments either."""
    seen, make_pairs, report = {}, train.make_pairs, train.report_samples
    def watched(sft, *rest):
        gc.collect()
        seen["optimizers"] = [o for o in gc.get_objects() if type(o) is torch.optim.AdamW]
        seen["gradients"] = [p for p in sft.parameters() if p.grad is not None]
        seen["state"] = load_checkpoint(tmp_path / "out" / "state.pt")["SFT"][2]
        return make_pairs(sft, *rest)
    monkeypatch.setattr(train, "make_pairs", watched)
    monkeypatch.setattr(train, "report_exactly", lambda *_: {})
    monkeypatch.setattr(train, "report_samples", lambda reference, policy, *rest: seen.update(
        trainable=[any(p.requires_grad for p in model.parameters()) for model in (reference, policy)]) or report(reference, policy, *rest))
    gc.collect()
    train.main([*TINY, "--out", str(tmp_path / "out")])
    assert seen == {"optimizers": [], "gradients": [], "state": None, "trainable": [False, True]}
    assert load_checkpoint(tmp_path / "out" / "state.pt")["DPO"][2] is None


def test_the_exact_report_computes_the_optimum_at_the_given_beta_and_changes_no_weights():
    cfg, model, prompts = Config(device="cpu", beta=0.7), tiny_model(), data.toy_prompts()[1][:2]
    policy, state = tiny_model(n_embd=32), torch.get_rng_state()
    weights = copy.deepcopy(policy.state_dict())
    figures = train.report_exactly(model, policy, prompts, cfg, TOKENIZER)
    assert model.training and all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in policy.state_dict().items())
    ref, logps = (train.outcome_logps(m, prompts, cfg, TOKENIZER).numpy() for m in (model, policy))
    r = data.outcome_rewards(prompts).numpy()
    z = np.exp(ref + r / 0.7).sum(-1, keepdims=True)
    star = ref + r / 0.7 - np.log(z)
    assert figures["optimum/reward"] == pytest.approx((np.exp(star) * r).sum(-1).mean(), rel=1e-5)
    assert figures["optimum/objective"] == pytest.approx(0.7 * np.log(z).mean(), rel=1e-5)  # J(π*) = β log Z
    assert figures["kl_to_optimum"] == pytest.approx((np.exp(logps) * (logps - star)).sum(-1).mean(), rel=1e-4)


@pytest.mark.parametrize("total, malformed", [(0.9, 0.1), (1 - 1e-8, 1e-6), (1 + 1e-7, 1e-6)])
def test_malformed_text_gets_the_rest_and_at_least_what_rounding_can_tell(monkeypatch, total, malformed):
    """1 - Σ p is noise of either sign if the reviews have all probability; its floor is 1e-6."""
    monkeypatch.setattr(train, "score", lambda *_: torch.full((1884,), total / 1884).double().log())
    logps = train.outcome_logps(None, data.toy_prompts()[1][:1], None, TOKENIZER)
    assert logps.shape == (1, 1885) and logps[0, -1].exp().item() == pytest.approx(malformed, rel=1e-6)


def test_a_collapsed_sft_model_gets_a_report_with_nan_and_null(tmp_path, capsys, monkeypatch):
    """All probability on one outcome leaves no pair of two different outcomes. JSON has null for nan."""
    prompts, held_out_prompts = data.toy_prompts()
    monkeypatch.setattr(data, "toy_prompts", lambda: (prompts, held_out_prompts[:2]))
    train.main("--n_layer 1 --n_embd 16 --sft_steps 2 --steps 1 --sft_learning_rate 3 --n_pairs 500 --device cpu --out".split() + [str(tmp_path / "out")])
    printed, report = capsys.readouterr(), read_metrics(tmp_path / "out")[-1]
    assert printed.err == "" and re.search(r"preference accuracy +nan +nan +nan\n", printed.out)
    for name in ("accuracy", "margin", "loss", "chosen_change", "rejected_change"):
        assert report[f"report/sft/{name}"] is None and report[f"report/dpo/{name}"] is None
    assert report["report/objective_share"] is None and report["report/sft/reward"] == pytest.approx(-7, abs=1e-3)


def test_toy_pairs_come_from_all_training_prompts_and_held_out_pairs_from_the_others(capsys):
    model, cfg = tiny_model(), Config(n_pairs=400, device="cpu")
    task = train.ToyTask(cfg)
    pairs, held_out = task.pairs(model)
    kept = int(re.search(r"400 pairs sampled, (\d+) kept", capsys.readouterr().out)[1])
    prompts = [{TOKENIZER.decode(pair.prompt) for pair in side} for side in (pairs, held_out)]
    assert [sorted(x) for x in prompts] == [sorted(x) for x in data.toy_prompts()]
    assert len(pairs) == kept and len(held_out) <= 256 and all(pair.chosen != pair.rejected for pair in pairs + held_out)
    with torch.no_grad():  # a model that always gives EOS first
        model.ln_f.bias[0] = 300
        model.wte.weight[TOKENIZER.eot_token, 0] = 2
    with pytest.raises(SystemExit) as stop:
        task.pairs(model)
    assert stop.value.code == 2 and "error: all sampled pairs are identical answers" in capsys.readouterr().err


def test_the_chosen_completion_has_the_higher_reward_as_often_as_bradley_terry_says(small):
    model = GPT.load(small[1] / "sft.pt")
    pairs = train.make_pairs(model, data.toy_prompts()[0], 4000, Config(seed=7, device="cpu"), TOKENIZER)
    reward = lambda x, y: data.reward(TOKENIZER.decode(x), data.decode(TOKENIZER, y))
    gaps = np.array([reward(x, y_w) - reward(x, y_l) for x, y_w, y_l in pairs])
    expected = np.mean(1 / (1 + np.exp(-abs(gaps[gaps != 0]))))
    assert np.mean(gaps[gaps != 0] > 0) == pytest.approx(expected, abs=0.02)


def test_sft_on_own_pairs_uses_the_chosen_completions_of_training_prompts():
    task = train.FileTask(Config(data=PAIRS, tokenizer="toy", device="cpu"), tiny_model())
    training, held_out = task.pairs(None)
    assert [tuple(row) for row in task.sft_rows()] == [(pair.prompt, pair.chosen) for pair in training]
    assert len(held_out) > 10 and not {tuple(p.prompt) for p in training} & {tuple(p.prompt) for p in held_out}


def write_pairs(path, rows):
    path.write_text("".join(json.dumps(dict(zip(data.KEYS, row, strict=True))) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_without_a_held_out_pair_the_report_samples_for_training_prompts(tmp_path, capsys):
    """One prompt cannot be split. One sample has no standard error, and JSON has null for it."""
    path = write_pairs(tmp_path / "p.jsonl", [("q", f"a{i}", f"b{i}") for i in range(9)])
    train.main([*OWN, "--data", path, "--out", str(tmp_path / "out")])
    printed, report = capsys.readouterr().out, read_metrics(tmp_path / "out")[-1]
    assert "         0 held out" in printed and "\nsamples for training prompts\n\n'q'\n    SFT " in printed and "nan" not in printed and "held-out accuracy" not in printed
    assert report.keys() == {"report/sampled_kl", "report/sampled_kl_error"} and report["report/sampled_kl_error"] is None
    assert not any("eval/loss" in m for m in read_metrics(tmp_path / "out"))


def test_the_report_uses_at_most_256_pairs_and_32_prompts_with_room_for_a_sample(tmp_path, capsys, monkeypatch):
    """Prompts that fill the block lose their first tokens, so that half of --block_size is left for the sample."""
    evaluated, asked = [], []
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda model, pairs, cfg: evaluated.append(len(pairs)) or evaluate(model, pairs, cfg))
    monkeypatch.setattr(train, "report_samples", lambda reference, policy, prompt_ids, n, *_: asked.append((prompt_ids, n)) or {})
    rows = [("!" * 40 + f" question {i // 2}", " yes", f" no {i}") for i in range(600)]
    train.main([*OWN, "--data", write_pairs(tmp_path / "p.jsonl", rows), "--held_out", "0.7", "--block_size", "32", "--out", str(tmp_path / "out")])
    (prompt_ids, n), = asked
    assert evaluated == [256] * 3 and n == 16
    assert len(prompt_ids) == len(set(prompt_ids)) == 32 and all(len(x) == 16 for x in prompt_ids)
    assert all(TOKENIZER.decode(x)[-1].isdigit() for x in prompt_ids)  # the end of the question


def test_dropped_pairs_are_announced_first_and_a_file_without_pairs_is_refused(tmp_path, capsys):
    rows = [("q", "a" * 200, "b")] * 6 + [("q", "a", "b"), ("r", "a", "c"), ("s", "", "b")]
    with pytest.raises(SystemExit):
        train.main([*OWN, "--data", write_pairs(tmp_path / "p.jsonl", rows[:6]), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert printed.err == f"error: {tmp_path}/p.jsonl: no pair to train on\n" and not (tmp_path / "out").exists()
    train.main([*OWN, "--data", write_pairs(tmp_path / "p.jsonl", rows), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == ["Warning: 7 of 9 pairs are dropped.", f"         9 pairs in {tmp_path}/p.jsonl", "         1 to train on", "         1 held out (--held_out 0.1)",
                         "         1 dropped: a text is blank", "         6 dropped: a completion over half of --block_size 256; they need --block_size 402 to 402",
                         "mean length: chosen 2.0, rejected 2.0 tokens"]


def test_the_warning_about_dropped_pairs_comes_if_more_than_a_fifth_is_dropped(tmp_path, capsys):
    for blank, warned in ((1, False), (2, False), (3, True)):
        rows = [(f"q{i}", "a", "b") for i in range(10 - blank)] + [("", "a", "b")] * blank
        train.FileTask(Config(data=write_pairs(tmp_path / "p.jsonl", rows), tokenizer="toy", device="cpu"), tiny_model())
        assert capsys.readouterr().out.startswith("Warning: 3 of 10 pairs are dropped.\n") == warned


def test_fields_that_are_not_used_and_the_limit_of_the_model_are_named(tmp_path, capsys, model_file):
    records = [{"id": i, "system": "s", "prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(9)] + [
        {"prompt": "q", "chosen": "a" * 300, "rejected": "b"}, {"prompt": "q", "chosen": "a" * 200, "rejected": "b", "image": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    train.main([*TINY[6:], "--init", model_file, "--sft_steps", "1", "--steps", "1", "--block_size", "64", "--data", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "\n        10 with fields that are not used: id, image, system\n" in printed
    assert "\n         2 dropped: a completion over half of --block_size 64; they need --block_size 402 to 602; the model of --init allows 256\n" in printed


def test_rows_of_long_runs_fit_80_columns(capsys):
    for figure in (-999.999, 1e30, -1e30):
        for steps in (7, 1000, 9999, 10_000, 10**6):
            train.print_row("DPO", steps, steps, [{name: figure for name in train.COLUMNS if name != "nats_per_token"}], 5900, is_first_row=True)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines) and all(len(line.split()) in (0, 10) or line.split()[0] == "step" for line in lines)


# A model to start from


def test_init_starts_from_a_checkpoint_and_sft_can_be_skipped(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "report_exactly", lambda *_: {})
    sft = small[1] / "sft.pt"
    train.main(["--sft_steps", "0", "--steps", "3", "--n_pairs", "100", "--init", str(sft), "--device", "cpu", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "\nSFT " not in printed and printed.startswith("β 0.1, learning rates 1e-05 (SFT) and 1e-06 (DPO)")
    before, after = GPT.load(sft), GPT.load(tmp_path / "out" / "sft.pt")
    assert before.config == after.config and all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert all(m["stage"] == "DPO" for m in read_metrics(tmp_path / "out")[:-1])


def test_init_determines_tokenizer_and_sizes_and_flags_for_them_are_refused(model_file, tmp_path, monkeypatch):
    GPT(GPTConfig(299, 256, n_head=2, n_embd=16, tokenizer="toy")).save(model_file)
    for flags, size in ((["--block_size", "120"], 120), ([], 256)):
        cfg = train.parse_settings(["--init", model_file, "--data", PAIRS, *flags])
        model = train.make_model(cfg)
        assert (cfg.tokenizer, cfg.block_size, model.config.n_head) == ("toy", size, 2)
        assert train.replace(cfg, dtype="float32").block_size == size  # the settings can be copied
    for name, value in (("n_layer", 1), ("n_head", 2), ("n_embd", 16), ("tokenizer", "toy")):
        with pytest.raises(ValueError, match=f"^leave out --{name}, because the model of --init determines it$"):
            train.make_model(train.parse_settings(["--init", model_file, f"--{name}", str(value)]))
    with pytest.raises(ValueError, match="^--block_size 257: expected 16 to 256, which is the limit of the model of --init$"):
        train.make_model(train.parse_settings(["--init", model_file, "--block_size", "257"]))
    for rows, message in ((11, "wte.weight has 11 rows, but the tokenizer toy has 299 tokens$"), (300, "has 300 rows, .* 299 tokens; remove the rows from 299 on$")):
        GPT(GPTConfig(rows, tokenizer="toy")).save(tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"^{tmp_path}/other.pt: .*{message}"):
            train.make_model(train.parse_settings(["--init", str(tmp_path / "other.pt")]))
    monkeypatch.setattr(data, "get_tokenizer", lambda name: type("GPT2", (), {"n_vocab": 50257}))
    GPT(GPTConfig(50304, n_head=1, n_embd=2, tokenizer="gpt2")).save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="wte.weight has 50,304 rows, but the tokenizer gpt2 has 50,257 tokens; remove the rows from 50,257 on$"):
        train.make_model(train.parse_settings(["--init", str(tmp_path / "other.pt")]))


@pytest.mark.parametrize("n_embd, expected", [(64, [1]), (512, [])])  # 91,000 and 3.4 million weights
def test_small_models_run_on_one_thread_large_ones_on_all_and_denormals_are_flushed(monkeypatch, n_embd, expected):
    """Without flushing, 31 separable pairs took five times as long."""
    threads, flushed = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "set_flush_denormal", flushed.append)
    train.make_model(Config(device="cpu", n_embd=n_embd))
    assert threads == expected and flushed == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pipeline_runs_on_the_gpu(tmp_path, dtype):
    train.main([*TINY[:-2], "--device", "cuda", "--dtype", dtype, "--out", str(tmp_path / "out")])
    dpo = stage_metrics(tmp_path / "out")
    assert dpo[0]["loss"] == pytest.approx(LN2, abs=1e-2) and dpo[-1]["loss"] != dpo[0]["loss"]
