"""train.py: the command line, the loop, the stages, and one small run that must beat a bar on held-out prompts."""
import copy
import gc
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import train
from dpo import dpo_loss
from model import GPT, GPTConfig
from tests.test_reliability import finish
from train import Config

ROOT = os.path.dirname(os.path.abspath(train.__file__))
PAIRS = os.path.join(ROOT, "tests", "pairs.jsonl")
TOKENIZER = data.toy_tokenizer()
TINY = "--n_layer 1 --n_embd 16 --sft_steps 3 --steps 3 --n_pairs 100 --n_reviews 100 --device cpu".split()
OWN = [*TINY, "--data", PAIRS, "--tokenizer", "toy"]


def run(*arguments, **options):
    return subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *map(str, arguments)],
                          capture_output=True, text=True, **options)


def read_metrics(folder):
    with open(folder / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def dpo_metrics(folder):
    return [m for m in read_metrics(folder) if m.get("stage") == "DPO"]


def tiny_model(**shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(TOKENIZER.n_vocab, **{"n_layer": 1, "n_head": 2, "n_embd": 16} | shape))


def tiny_pairs(n=12):
    """Pairs of unequal lengths, as ids."""
    rng, prompts = np.random.default_rng(0), data.prompts()[0]
    drawn = [data.corpus(prompts[:1], n, rng) for _ in range(2)]
    return [(*data.encode(TOKENIZER, x, y_w), data.encode(TOKENIZER, x, y_l)[1])
            for (x, y_w), (_, y_l) in zip(*drawn)]


def lengths_of(examples):
    return [sum(map(len, example)) for example in examples]


def fit_dpo(policy, pairs, cfg, ref_logps):
    """train.fit on the DPO loss: yields (step, metrics)."""
    def loss_of(batch):
        return train.pair_metrics(train.logps_of(policy, [pairs[i] for i in batch], cfg), ref_logps[batch], cfg)
    optimizer = torch.optim.AdamW(policy.parameters(), **train.ADAMW)
    return train.fit(policy, optimizer, lengths_of(pairs), loss_of, cfg.steps, cfg.learning_rate, cfg)


def test_a_small_run_beats_the_bar_on_held_out_prompts(small):
    process, out = small
    assert process.returncode == 0, process.stderr
    report = {name.removeprefix("report/"): value for name, value in read_metrics(out)[-1].items()}
    assert set(report) == {"objective_share", "kl_to_optimum", "implicit_reward_correlation", "kl", "kl_error"} | {
        f"{row}/{figure}" for row in ("sft", "dpo", "optimum") for figure in data.FIGURES}
    assert report["sft/reward"] < 0.6 and report["dpo/reward"] > 2.5
    assert abs(report["kl"] - report["dpo/kl"]) < 4 * report["kl_error"] < 4  # the estimate that own pairs get, beside the truth
    assert 0.95 < report["objective_share"] < 1 and 0 < report["kl_to_optimum"] < 0.1
    assert report["dpo/valid"] > 0.99 and report["dpo/win_rate"] > 0.85
    assert report["implicit_reward_correlation"] > 0.98
    assert 0.97 < report["dpo/accuracy"] / report["optimum/accuracy"] < 1
    for figure in ("margin", "chosen_change", "rejected_change", "loss"):  # every curve ends near its target
        assert report[f"dpo/{figure}"] == pytest.approx(report[f"optimum/{figure}"], abs=0.5)
    assert report["optimum/chosen_change"] < 0  # the optimum itself demands that it falls


def test_metrics_hold_every_step_under_the_fields_names(small):
    metrics, dpo = read_metrics(small[1]), dpo_metrics(small[1])
    sft = [m for m in metrics if m.get("stage") == "SFT"]
    assert [m["step"] for m in sft] == list(range(1, 501)) and [m["step"] for m in dpo] == list(range(1, 401))
    assert set(dpo[0]) == {"stage", "step", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
                           "rewards/margins", "logps/chosen", "logps/rejected"}
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference agree
    assert dpo[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert np.mean([m["loss"] for m in dpo[-50:]]) < 0.5


def test_output_fits_80_columns_and_shows_the_means_of_each_tenth(small):
    lines = small[0].stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "\r" not in small[0].stdout
    rows = [line.split() for line in lines if line.startswith("DPO ") and "/400 " in line]
    assert len(rows) == 10
    headers = [line for line in lines if line.split()[:1] == ["step"]]  # one a stage, each label above its column's end
    assert [line.split() for line in headers] == [["step", "loss", "ETA"], ["step", "loss", "accuracy", "margin", "chosen", "rejected", "ETA"]]
    first = lines[lines.index(headers[1]) + 1]
    assert first.startswith("DPO ") and all(first[headers[1].index(label) + len(label) - 1].isdigit() and first[headers[1].index(label) + len(label)] == " "
                                            for label in headers[1].split()[:-2])
    for k, row in enumerate(rows):
        tenth = dpo_metrics(small[1])[40 * k:40 * (k + 1)]
        assert float(row[2]) == pytest.approx(np.mean([m["loss"] for m in tenth]), abs=6e-4)
    assert small[0].stderr == ""


def test_checkpoints_load_as_plain_weights_and_the_reference_is_not_the_policy(small):
    sft, dpo = (torch.load(small[1] / name, weights_only=True) for name in ("sft.pt", "dpo.pt"))
    for checkpoint in (sft, dpo):
        assert GPT.from_gpt2(**checkpoint).config == GPTConfig(299, 256, 1, 4, 64, "toy")
        assert all(p.dtype == torch.float32 for p in checkpoint["weights"].values())
    assert not torch.equal(sft["weights"]["lm_head.weight"], dpo["weights"]["lm_head.weight"])
    assert sorted(os.listdir(small[1])) == ["dpo.pt", "metrics.jsonl", "sft.pt", "state.pt"]


def test_the_same_seed_gives_the_same_metrics_and_another_seed_gives_others(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "report_exactly", lambda *_: {})
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        train.main([*TINY, "--seed", str(seed), "--out", str(tmp_path / name)])
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")


def test_the_seed_decides_the_weights_the_labels_and_the_batches(tmp_path, monkeypatch):
    """Each by itself: everything else is held fixed."""
    first_weights, batches = [], []
    monkeypatch.setattr(train.Run, "__init__", lambda self, cfg, model, texts: first_weights.append(
        model.wte.weight.detach().clone()) or sys.exit())
    for seed in ("0", "1", "1"):
        with pytest.raises(SystemExit):
            train.main([*TINY, "--seed", seed])
    assert not torch.equal(*first_weights[:2]) and torch.equal(*first_weights[1:])
    corpora, corpus = [], data.corpus
    monkeypatch.setattr(data, "corpus", lambda *arguments: corpora.append(corpus(*arguments)) or corpora[-1])
    for seed in ("0", "1"):
        with pytest.raises(SystemExit):
            train.main([*TINY, "--seed", seed])
    assert len(corpora[0]) == 100 and corpora[0] != corpora[1]
    both = [data.encode(TOKENIZER, "", y)[1] for y in (" dull", " slow")]
    monkeypatch.setattr(train, "sample", lambda model, prompts, *_: [both[2 * i // len(prompts)] for i in range(len(prompts))])
    odd = [train.make_pairs(None, data.prompts()[0], Config(n_pairs=201, seed=seed), TOKENIZER) for seed in (0, 1, 2)]
    assert len(odd[0]) == 201 and all(a != b for a, b in zip(odd, odd[1:]))
    model = torch.nn.Linear(1, 1)
    for seed in (0, 1):
        def loss_of(batch):
            batches.append(batch.tolist())
            return {"loss": model.weight.sum().expand(len(batch))}
        list(train.fit(model, torch.optim.SGD(model.parameters()), [1] * 50, loss_of, 3, 0.1, Config(seed=seed, batch_size=10, device="cpu")))
    assert batches[:3] != batches[3:]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_with_float32_weights_and_reports_in_float32(tmp_path, monkeypatch, dtype):
    """Samples are drawn outside of autocast; scored inside it, they would be those of another policy."""
    reported = []
    monkeypatch.setattr(train, "report_exactly", lambda sft, policy, prompts, cfg, _: (
        reported.append(cfg.dtype) or {}))
    monkeypatch.setattr(train, "report_on_samples", lambda *arguments: reported.append(arguments[4].dtype) or {})
    train.main([*TINY, "--dtype", dtype, "--out", str(tmp_path)])
    metrics = dpo_metrics(tmp_path)
    assert all(math.isfinite(m["loss"]) for m in metrics) and metrics[-1]["loss"] != metrics[0]["loss"]
    assert torch.load(tmp_path / "dpo.pt", weights_only=True)["weights"]["lm_head.weight"].dtype == torch.float32
    assert reported == ["float32", "float32"]


@pytest.mark.parametrize("arguments, message", [
    (["--beta", "0"], "expected beta above 0 and below 2**32, got 0.0"), (["--beta", "nan"], "expected beta above 0 and below 2**32, got nan"),
    (["--beta", "inf"], "expected beta above 0 and below 2**32, got inf"),
    (["--n_layer", str(10**20)], f"expected n_layer above 0 and below 2**32, got {10**20}"),
    (["--label_smoothing", "0.5"], "expected label_smoothing in [0, 0.5), got 0.5"),
    (["--label_smoothing", "-0.1"], "expected label_smoothing at least 0 and below 2**32, got -0.1"),
    (["--learning_rate", "0"], "expected learning_rate above 0 and below 2**32, got 0.0"),
    (["--steps", "0"], "expected steps above 0 and below 2**32, got 0"), (["--batch_size", "-3"], "expected batch_size above 0 and below 2**32, got -3"),
    (["--seed", str(2**32)], f"expected seed at least 0 and below 2**32, got {2**32}"),
    (["--seed", "-1"], "expected seed at least 0 and below 2**32, got -1"), (["--block_size", "8"], "expected block_size at least 16 and below 2**32, got 8")])
def test_an_impossible_value_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError) as refused:
        train.parse_config(arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize("arguments, message", [
    (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
    (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from 'auto', 'float32', 'bfloat16', 'float16')"),
    (["--tokenizer", "bert"], "argument --tokenizer: invalid choice: 'bert' (choose from 'auto', 'toy', 'gpt2')"),
    (["--stepz", "3"], "unrecognized arguments: --stepz 3"), (["--ste", "3"], "unrecognized arguments: --ste 3")])
def test_a_flag_that_does_not_parse_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(arguments)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    assert printed.replace("'", "") == f"error: {message}\n".replace("'", "")  # Python 3.12 quotes choices otherwise


@pytest.mark.parametrize("arguments, message", [
    (["--beta", 0], "expected beta above 0 and below 2**32, got 0.0"), (["--n_head", 3], "expected n_head to divide n_embd = 64, got 3"),
    (["--data", "nope.jsonl"], "nope.jsonl: no such file or directory"), (["--data", ""], "[Errno 2] No such file or directory: ''"),
    (["--init", ""], "[Errno 2] No such file or directory: ''"), (["--init", "nope.pt"], "nope.pt: no such file or directory"),
    (["--data", "nope.jsonl", "--init", "nope.pt"], "nope.jsonl: no such file or directory")])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    assert finish(*arguments, "--out", tmp_path / "out") == (2, f"error: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    code, printed = finish("--device", "cuda", "--out", tmp_path / "out")
    assert code == 2 and printed.replace("'", "") == "error: argument --device: invalid choice: cuda (choose from cpu)\n"


def test_an_out_folder_that_cannot_be_made_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("kept")
    assert finish(*TINY, "--out", tmp_path / "file") == (2, f"error: {tmp_path}/file: file exists\n")
    assert (tmp_path / "file").read_text() == "kept"


def test_every_option_has_a_flag_a_help_text_and_reaches_the_config(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for f in train.fields(Config):
        assert f"--{f.name} " in text and f.metadata["help"].split()[0] in text
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "] == ["options", "data", "model", "SFT", "DPO", "run"]
    assert "(default: )" not in text and "(default: 0)" in " ".join(text.split())
    cfg = train.parse_config(["--beta", "0.5", "--steps", "7", "--out", "x", "--label_smoothing", "0.1"])
    assert (cfg.beta, cfg.steps, cfg.out, cfg.label_smoothing) == (0.5, 7, "x", 0.1)
    assert Config().device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_with_init_the_defaults_are_the_papers():
    """The toy world's learning rate of 1e-3 would wreck GPT-2. What is given counts all the same."""
    figures = lambda *arguments: (cfg := train.parse_config(arguments)) and (cfg.beta, cfg.learning_rate, cfg.sft_learning_rate)
    assert figures() == (1.0, 1e-3, 4e-3) and figures("--init", "w.bin") == (0.1, 1e-6, 1e-5)
    assert figures("--init", "w.bin", "--beta", "1.0", "--sft_learning_rate", "2e-3") == (1.0, 1e-6, 2e-3)


def test_weights_are_float32_and_do_not_decay():
    """Decay pulls to zero, not to the reference. In bfloat16 a weight of 0.02 would not move at all
    by a step of 1e-6; in float32, under bfloat16 autocast, nearly every weight does."""
    assert train.ADAMW["weight_decay"] == 0
    cfg = Config(steps=1, batch_size=12, learning_rate=1e-6, dtype="bfloat16", device="cpu")
    sft, pairs = tiny_model(), tiny_pairs()
    policy = copy.deepcopy(sft)
    list(fit_dpo(policy, pairs, cfg, train.score(sft, pairs, cfg)))
    moved = (policy.h[0].mlp.c_fc.weight != sft.h[0].mlp.c_fc.weight).float().mean()
    assert moved > 0.9 and policy.wte.weight.dtype == torch.float32


def test_the_learning_rate_warms_up_to_its_peak_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)]) and max(rates) == rates[9] == 2
    assert rates[9 + 45] == pytest.approx(1, abs=0.02) and 0 < rates[99] < 0.001 and rates[9:] == sorted(rates[9:], reverse=True)
    assert [train.learning_rate(step, n, 2.0) > 0 for n in (1, 2, 7) for step in range(1, n + 1)] == [True] * 10
    assert train.learning_rate(1, 1, 2.0) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_longer_than_1_is_clipped_to_1_and_a_shorter_one_is_not(dtype):
    """With SGD at a learning rate of 0.5 the weights move by half the clipped gradient. In float16 the scaled gradient
    must be unscaled before it is clipped, or the weights hardly move."""
    cfg = Config(batch_size=4, dtype=dtype, device="cpu")
    for slope, moved in ((1000.0, 0.5), (0.25, 0.125)):
        model = torch.nn.Linear(1, 1, bias=False)
        before = model.weight.item()
        loss_of = lambda batch: {"loss": slope * model.weight[0, 0].expand(len(batch))}
        list(train.fit(model, torch.optim.SGD(model.parameters()), [1] * 4, loss_of, 1, 0.5, cfg))
        assert before - model.weight.item() == pytest.approx(moved, rel=1e-3)


def test_fit_yields_each_step_with_the_means_of_its_batch_and_can_start_in_the_middle():
    """A resumed stage takes the batches and learning rates that are left, no others."""
    model, cfg = torch.nn.Linear(1, 1), Config(batch_size=5, device="cpu")
    def loss_of(batch):
        seen.append(batch.tolist())
        return {"loss": model.weight.sum() * torch.ones(len(batch)), "number": torch.from_numpy(batch).float()}
    def steps(start):
        optimizer = torch.optim.SGD(model.parameters())
        return [(step, metrics["number"], optimizer.param_groups[0]["lr"])
                for step, metrics in train.fit(model, optimizer, [1] * 20, loss_of, 8, 0.1, cfg, start)]
    seen = []
    whole = steps(0)
    assert [step for step, _, _ in whole] == list(range(1, 9))
    assert [number for _, number, _ in whole] == pytest.approx([np.mean(batch) for batch in seen])
    assert steps(5) == whole[5:] and steps(8) == []


def test_sft_lowers_the_loss_a_token_of_the_completion_and_does_not_score_the_prompt(tmp_path, monkeypatch):
    """In nats a token it starts at ln 299, whatever the length; with the prompt scored too it would be thrice as large."""
    monkeypatch.setattr(train, "make_pairs", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        train.main([*TINY, "--sft_steps", "60", "--n_reviews", "500", "--out", str(tmp_path)])
    losses = [m["loss"] for m in read_metrics(tmp_path)]
    assert np.mean(losses[:3]) == pytest.approx(math.log(299), rel=0.1) and losses[-1] < 0.8 * losses[0]


def test_dpo_moves_the_policy_and_leaves_the_reference_alone():
    """Were the two to share storage the loss would stay at ln 2; after one step it is below."""
    cfg, pairs = Config(steps=2, batch_size=12, device="cpu"), tiny_pairs()
    sft = tiny_model()
    before = copy.deepcopy(sft.state_dict())
    policy = copy.deepcopy(sft)
    (_, first), (_, second) = fit_dpo(policy, pairs, cfg, train.score(sft, pairs, cfg))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and second["loss"] < first["loss"] - 1e-4
    assert all(torch.equal(before[name], p) for name, p in sft.state_dict().items())
    assert not torch.equal(policy.wte.weight, sft.wte.weight)


def test_after_sft_the_reference_is_frozen_and_its_gradients_and_optimizer_are_gone(tmp_path, monkeypatch):
    """At GPT-2's size each of them would be another float32 copy of the weights."""
    seen, make_pairs = {}, train.make_pairs
    def watched(sft, *rest):
        seen["optimizers"] = [o for o in gc.get_objects() if type(o) is torch.optim.AdamW]
        seen["gradients"] = [p for p in sft.parameters() if p.grad is not None]
        return make_pairs(sft, *rest)
    def report(reference, policy, *_):
        seen["trainable"] = [any(p.requires_grad for p in model.parameters()) for model in (reference, policy)]
        return {}
    monkeypatch.setattr(train, "make_pairs", watched)
    monkeypatch.setattr(train, "report_exactly", report)
    runs, opened = [], train.Run.__init__
    monkeypatch.setattr(train.Run, "__init__", lambda self, *rest: runs.append(self) or opened(self, *rest))
    gc.collect()
    train.main([*TINY, "--out", str(tmp_path)])
    assert seen == {"optimizers": [], "gradients": [], "trainable": [False, True]}
    assert runs[0].state["SFT"][2] is runs[0].state["DPO"][2] is None  # nor are its moments kept for the state


def test_reference_scores_follow_their_pair_through_the_shuffle():
    """In every shuffled batch of the first epoch policy and reference agree, so the loss stays ln 2
    at a learning rate of 1e-9. A reference paired with other examples would show."""
    cfg, pairs, sft = Config(steps=6, batch_size=4, learning_rate=1e-9, device="cpu"), tiny_pairs(24), tiny_model()
    metrics = [m for _, m in fit_dpo(copy.deepcopy(sft), pairs, cfg, train.score(sft, pairs, cfg))]
    assert [m["loss"] for m in metrics] == pytest.approx([math.log(2)] * 6, abs=1e-5)
    assert len({round(m["logps/chosen"], 4) for m in metrics}) == 6


def test_beta_and_label_smoothing_reach_the_loss():
    pairs, results = tiny_pairs(), {}
    for options in ({}, {"beta": 0.2}, {"label_smoothing": 0.3}):
        cfg, sft = Config(steps=3, batch_size=12, device="cpu", **options), tiny_model()
        results[str(options)] = list(fit_dpo(copy.deepcopy(sft), pairs, cfg, train.score(sft, pairs, cfg)))[-1][1]["loss"]
    assert len(set(results.values())) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_and_reference_under_the_same_autocast_start_at_exactly_ln_2(dtype):
    cfg, pairs, model = Config(dtype=dtype, device="cpu"), tiny_pairs(), tiny_model()
    ref_logps, logps = train.score(model, pairs, cfg), train.score(model.train(), pairs, cfg)
    assert ref_logps.dtype == logps.dtype == torch.float32 and logps.shape == (12, 2)
    assert torch.equal(dpo_loss(*logps.T, *ref_logps.T, 1.0)[0], torch.full((12,), math.log(2)))
    other = train.score(model, pairs, Config(dtype="float32", device="cpu"))
    assert (dtype == "float32") == torch.equal(other, ref_logps)


def test_the_company_in_a_batch_changes_no_log_probability_and_no_batch_is_too_large(monkeypatch):
    cfg, model, pairs = Config(device="cpu"), tiny_model(), tiny_pairs(24)
    alone, sizes, logps_of = torch.cat([train.logps_of(model, [pair], cfg) for pair in pairs]), [], train.logps_of
    def watched(model, examples, cfg):
        sizes.append(len(examples) * max(lengths_of(examples)))
        return logps_of(model, examples, cfg)
    monkeypatch.setattr(train, "logps_of", watched)
    for tokens in (60, 2**13):  # a few pairs at once, and all
        monkeypatch.setattr(train, "MAX_TOKENS", tokens)
        assert torch.allclose(train.score(model, pairs, cfg), alone, atol=1e-5) and max(sizes) <= tokens
    assert len(sizes) > 5 and sizes[-1] > 60


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 50])
def test_accumulated_gradients_of_unequal_parts_are_those_of_the_whole_batch(parts):
    """Seven pairs in parts of 4 + 3, 3 + 2 + 2, … give one mean, and the same metrics."""
    pairs, sft, runs = tiny_pairs(7), tiny_model().double(), []
    for grad_accum in (1, parts):
        cfg, policy = Config(steps=3, batch_size=7, device="cpu", grad_accum=grad_accum), copy.deepcopy(sft)
        runs.append([(metrics, torch.cat([p.grad.flatten() for p in policy.parameters()]))
                     for _, metrics in fit_dpo(policy, pairs, cfg, train.score(sft, pairs, cfg) + 0.1)])
    for (whole, gradient), (accumulated, other) in zip(*runs):
        assert torch.allclose(gradient, other, rtol=1e-9, atol=1e-13) and gradient.norm() > 0.1
        assert whole == pytest.approx(accumulated, rel=1e-9)


def test_the_report_stands_beside_the_optimum_and_touches_nothing():
    """Random state, mode and gradients stay; the correlation is that of implicit and true rewards, prompt by prompt."""
    cfg, model, prompts = Config(device="cpu", beta=0.7), tiny_model(), data.prompts()[1][:2]
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    policy = copy.deepcopy(model)
    with torch.no_grad():
        policy.ln_f.weight *= 3
    figures = train.report_exactly(model, policy, prompts, cfg, TOKENIZER)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and str(np.random.get_state()) == numpy_state
    rewards = data.outcome_rewards(prompts)
    ref, dpo = (train.outcome_logps(m, prompts, cfg, TOKENIZER) for m in (model, policy))
    assert torch.allclose(dpo.exp().sum(-1), torch.ones(2).double()) and dpo.shape == (2, 1885)
    best = (ref + rewards / 0.7).log_softmax(-1)
    expected = [np.corrcoef((dpo - ref)[i, :-1], rewards[i, :-1])[0, 1] for i in (0, 1)]
    assert figures["implicit_reward_correlation"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert figures["kl_to_optimum"] == pytest.approx((dpo.exp() * (dpo - best)).sum(-1).mean().item())
    objective = {name: figures[f"{name}/objective"] for name in ("sft", "dpo", "optimum")}
    assert objective["sft"] == figures["sft/reward"]
    gap = objective["optimum"] - objective["dpo"]
    assert gap == pytest.approx(0.7 * figures["kl_to_optimum"], rel=1e-4)  # β KL(π‖π*): what any policy falls short by
    assert figures["objective_share"] == pytest.approx(1 - gap / (objective["optimum"] - objective["sft"]))


def test_where_nothing_is_to_be_gained_the_share_is_not_a_number_and_the_report_is_whole(monkeypatch):
    monkeypatch.setattr(train, "optimal_logps", lambda ref_logps, rewards, beta: ref_logps)
    model = tiny_model()
    figures = train.report_exactly(model, model, data.prompts()[1][:1], Config(device="cpu"), TOKENIZER)
    assert math.isnan(figures["objective_share"]) and figures["kl_to_optimum"] == 0


def test_pairs_are_two_samples_to_a_prompt_without_identical_ones(capsys):
    model, cfg = tiny_model(), Config(n_pairs=400, device="cpu")
    with torch.no_grad():  # a model that often says nothing at all, so that identical pairs occur
        model.ln_f.bias[0] = 3
        model.wte.weight[TOKENIZER.eot_token, 0] = 2
    prompts = data.prompts()[0]
    pairs = train.make_pairs(model, prompts, cfg, TOKENIZER)
    assert 0 < len(pairs) < 400 and f"{400 - len(pairs)} identical dropped" in capsys.readouterr().out
    assert all(chosen != rejected for _, chosen, rejected in pairs)
    assert {TOKENIZER.decode(x) for x, _, _ in pairs} <= set(prompts)
    assert all(1 <= len(y) <= data.MAX_NEW_TOKENS for _, *both in pairs for y in both)
    with torch.no_grad():
        model.ln_f.bias[0] = 300
    with pytest.raises(ValueError, match="expected pairs of different samples, but each pair's two are identical"):
        train.make_pairs(model, prompts, cfg, TOKENIZER)


def test_the_chosen_completion_is_the_better_one_as_often_as_bradley_terry_says(small):
    model = GPT.load(small[1] / "sft.pt")
    pairs = train.make_pairs(model, data.prompts()[0], Config(n_pairs=4000, seed=7, device="cpu"), TOKENIZER)
    worth = lambda x, y: data.reward(TOKENIZER.decode(x), data.decode(TOKENIZER, y))
    gaps = np.array([worth(x, y_w) - worth(x, y_l) for x, y_w, y_l in pairs])
    expected = np.mean(1 / (1 + np.exp(-abs(gaps[gaps != 0]))))
    assert np.mean(gaps[gaps != 0] > 0) == pytest.approx(expected, abs=0.02)


def test_the_samples_of_different_prompts_differ(capsys):
    """One generator serves the whole table: an untrained model says something else to each prompt."""
    model, prompts = tiny_model(), [TOKENIZER.encode_ordinary(x) for x in data.prompts()[1]]
    train.report_on_samples(model, model, prompts, 12, Config(device="cpu"), TOKENIZER)
    printed = capsys.readouterr().out
    assert len({line for line in printed.splitlines() if line.startswith("    SFT")}) == 4
    assert printed.replace("SFT", "DPO").count("    DPO") == 8 and printed.count("Last night") == 4


def test_own_pairs_from_a_file_teach_on_prompts_that_were_held_out(tmp_path):
    """200 pairs of real sentences, in which short, direct answers are preferred to evasive ones."""
    process = run("--data", PAIRS, "--tokenizer", "toy", "--sft_steps", 100, "--steps", 40, "--batch_size", 32,
                  "--held_out", 0.2, "--learning_rate", 3e-4, "--device", "cpu", "--out", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "to train on" in process.stdout and max(map(len, process.stdout.splitlines())) <= 80, process.stdout
    metrics, report = dpo_metrics(tmp_path / "out"), read_metrics(tmp_path / "out")[-1]
    assert metrics[0]["rewards/accuracies"] == 0.5 and metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert report["report/rewards/accuracies"] > 0.85 and report["report/rewards/margins"] > 0.5
    assert report["report/loss"] < 0.5 and report["report/rewards/chosen"] > report["report/rewards/rejected"]
    assert 0 < report["report/kl_error"] < 5 and report["report/kl"] > -3 * report["report/kl_error"]
    held_out = [m for m in metrics if "eval/loss" in m]
    assert [m["step"] for m in held_out] == list(range(4, 41, 4)) and len([m for m in metrics if "eval/rewards/accuracies" in m]) == 10
    last = [line.split() for line in process.stdout.splitlines() if line.startswith("DPO ")][-1]
    assert [float(cell) for cell in last[-3:-1]] == pytest.approx([held_out[-1][f"eval/{name}"] for name in ("loss", "rewards/accuracies")], abs=6e-4)
    assert held_out[-1]["eval/loss"] < 0.5 and held_out[-1]["eval/rewards/accuracies"] > 0.85


def test_held_out_figures_during_training_move_nothing(tmp_path, monkeypatch):
    """The weights come out the same without them."""
    train.main([*OWN, "--out", str(tmp_path / "a")])
    monkeypatch.setattr(train, "report_on_pairs", lambda *_: {})
    monkeypatch.setattr(train.Run, "train", lambda self, *arguments, train=train.Run.train: train(self, *arguments[:6]))
    train.main([*OWN, "--out", str(tmp_path / "b")])
    a, b = (torch.load(tmp_path / name / "dpo.pt", weights_only=True)["weights"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any("eval/loss" in m for m in read_metrics(tmp_path / "a"))
    assert not any("eval/loss" in m for m in read_metrics(tmp_path / "b"))


@pytest.mark.parametrize("steps, looks", [(20, 10), (25, 10), (19, 10), (7, 7)])
def test_held_out_examples_are_scored_ten_times_and_without_gradient(tmp_path, capsys, steps, looks):
    """So is the loss that is checked before a state is saved. As many rows are printed."""
    model, seen = tiny_model(), []
    def loss_of(batch):
        seen.append((batch.tolist(), torch.is_grad_enabled()))
        return {"loss": model.wte.weight[batch].sum(1)}
    run = train.Run(Config(out=str(tmp_path), device="cpu", batch_size=4), model, [])
    run.train("DPO", model, [[[1]]] * 8, loss_of, steps, 1e-3, np.array([8, 9]))
    assert seen.count(([8, 9], False)) == capsys.readouterr().out.count("DPO ") == looks
    assert [batch for batch, trains in seen if not trains and batch != [8, 9]] == [[0, 1, 2, 3]]
    assert sum(trains for _, trains in seen) == steps


def test_the_corpus_of_own_pairs_is_what_was_preferred_and_nothing_that_is_held_out(tmp_path, capsys, monkeypatch):
    """And the pairs that are watched while it trains are held out."""
    seen, watched = {}, {}
    def run_train(self, stage, model, examples, loss_of, steps, peak, held_out=()):
        seen[stage] = examples
        if len(held_out):
            watched.update(found=loss_of(held_out)["logps/chosen"], model=model)
    monkeypatch.setattr(train.Run, "train", run_train)
    monkeypatch.setattr(train, "report_on_pairs", lambda reference, policy, pairs, *_: seen.update(held_out=pairs) or {})
    train.main([*OWN, "--out", str(tmp_path)])
    text_of = lambda x, y: (TOKENIZER.decode(x), TOKENIZER.decode(y[:-1]))
    chosen = {pair[:2] for pair in data.read_jsonl(PAIRS)}
    assert [text_of(*example) for example in seen["SFT"]] == [text_of(x, y_w) for x, y_w, _ in seen["DPO"]]
    assert {text_of(*example) for example in seen["SFT"]} == chosen - {text_of(x, y_w) for x, y_w, _ in seen["held_out"]}
    assert len(seen["held_out"]) > 10
    assert torch.allclose(watched["found"], train.score(watched["model"], seen["held_out"][:32], Config(device="cpu"))[:, 0], atol=1e-4)


def test_no_pairs_need_be_held_out(tmp_path, capsys):
    train.main([*OWN, "--held_out", "0", "--out", str(tmp_path)])
    assert "200 to train on" in capsys.readouterr().out
    assert [m["stage"] for m in read_metrics(tmp_path)] == ["SFT"] * 3 + ["DPO"] * 3


def test_the_report_on_own_pairs_has_256_pairs_and_32_samples_at_most_and_its_time(tmp_path, capsys, monkeypatch):
    asked, shown = [], []
    monkeypatch.setattr(train, "report_on_pairs", lambda reference, policy, pairs, *_: asked.append(len(pairs)) or {})
    monkeypatch.setattr(train, "report_on_samples", lambda reference, policy, prompts, longest, *_: shown.append((prompts, longest)) or {})
    pairs = [(f"question {i // 2}", " yes", f" no {i}") for i in range(600)]  # two to each prompt
    monkeypatch.setattr(data, "read_jsonl", lambda path: pairs)
    train.main([*OWN, "--held_out", "0.7", "--out", str(tmp_path)])
    prompts, longest = shown[0]
    assert asked == [256] and len(prompts) == len(set(map(tuple, prompts))) == 32 and longest == 128
    assert "The report took " in capsys.readouterr().out


def test_the_kl_is_the_mean_log_ratio_of_samples_with_its_standard_error(capsys):
    reference, cfg = tiny_model(), Config(device="cpu")
    policy, prompts = copy.deepcopy(reference), [x for x, _, _ in tiny_pairs(9)]
    with torch.no_grad():
        policy.ln_f.weight *= 3
    figures = train.report_on_samples(reference, policy, prompts, 128, cfg, TOKENIZER)
    samples = list(zip(prompts, train.sample(policy, prompts, 128, cfg, TOKENIZER)))
    ratios = (train.score(policy, samples, cfg) - train.score(reference, samples, cfg)).numpy()
    assert figures["kl"] == pytest.approx(ratios.mean()) and figures["kl_error"] == pytest.approx(ratios.std(ddof=1) / 3)
    assert f"from 9 samples: {ratios.mean():.3f} ± " in capsys.readouterr().out
    with pytest.warns(UserWarning, match="degrees of freedom"):
        figures = train.report_on_samples(model := tiny_model(), model, prompts[:1], 128, cfg, TOKENIZER)
    assert figures["kl"] == 0 and math.isnan(figures["kl_error"])  # one sample has no error


def test_a_prompt_that_samples_would_not_fit_behind_loses_its_first_tokens(tmp_path, monkeypatch):
    """Half of --block_size is for the prompt, half for the completion, since none is longer."""
    shown, pairs = [], [("a thriller" + "!" * 12, " dull", " slow"), ("?", " tense tense tense tense tense tense", " dull")] * 20
    monkeypatch.setattr(data, "read_jsonl", lambda path: pairs)
    monkeypatch.setattr(train, "report_on_samples", lambda reference, policy, prompts, longest, *_: shown.append((prompts, longest)) or {})
    monkeypatch.setattr(data, "split_pairs", lambda *arguments, split=data.split_pairs: (split(*arguments)[0], split(*arguments)[0], {}))
    train.main([*OWN, "--block_size", "16", "--held_out", "0", "--out", str(tmp_path)])
    ids = TOKENIZER.encode_ordinary
    assert shown == [([ids("!" * 8), ids("?")], 8)]


def test_init_starts_from_a_checkpoint_and_sft_can_be_skipped(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "report_exactly", lambda *_: {})
    sft = small[1] / "sft.pt"
    train.main([*TINY, "--init", str(sft), "--sft_steps", "0", "--out", str(tmp_path)])
    assert "SFT   " not in capsys.readouterr().out
    before, after = GPT.load(sft), GPT.load(tmp_path / "sft.pt")
    assert before.config == after.config and before.config.n_embd == 64  # not the flag's 16
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert all(m["stage"] == "DPO" for m in read_metrics(tmp_path)[:-1])


def test_init_knows_its_tokenizer_and_block_size_stays_what_was_asked_for(small, tmp_path, capsys):
    """No --tokenizer is needed beside a checkpoint of ours; of 256 positions 120 are used if 120 are asked for."""
    train.main([*TINY, "--data", PAIRS, "--init", str(small[1] / "sft.pt"), "--block_size", "120", "--out", str(tmp_path)])
    counts = data.split_pairs(data.read_jsonl(PAIRS), TOKENIZER, 120, 0.1, 0)[2]
    dropped = counts["with too long a completion, dropped"]
    assert 0 < dropped < 200 and f"{dropped:10,} with too long a completion, dropped" in capsys.readouterr().out


def test_init_of_another_vocabulary_a_smaller_block_or_no_model_is_refused(tmp_path):
    for name, config in {"other": GPTConfig(11, tokenizer="toy"), "nameless": GPTConfig(299),
                         "gpt2": GPTConfig(50257, n_head=1, n_embd=2, tokenizer="gpt2"), "short": GPTConfig(299, 32, tokenizer="toy")}.items():
        GPT(config).save(tmp_path / f"{name}.pt")
    def refused(name, *flags):
        with pytest.raises(ValueError) as error:
            train.main([*TINY, "--init", str(tmp_path / name), "--out", str(tmp_path / "out"), *flags])
        assert not (tmp_path / "out").exists()
        return str(error.value)
    wanted = "expected tokenizer toy, 299 tokens and block_size 256 or more, got GPTConfig("
    assert f"other.pt: {wanted}vocab_size=11, block_size=256, " in refused("other.pt")
    for flags in ([], ["--data", PAIRS, "--tokenizer", "toy"]):
        assert f"gpt2.pt: {wanted}vocab_size=50257, " in (message := refused("gpt2.pt", *flags)) and "tokenizer='gpt2'" in message
    assert "tokenizer='')" in refused("nameless.pt", "--tokenizer", "toy")
    assert f"short.pt: {wanted}vocab_size=299, block_size=32, " in refused("short.pt")
    assert "pairs.jsonl: not a checkpoint, damaged, or larger than memory" in refused(PAIRS)


@pytest.mark.parametrize("content, message", [
    (b"", "expected a pair to train on, got {'to train on': 0"), (b"{\n", "Expecting property name"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "expected a pair to train on, got {'to train on': 0"), (None, "")])
def test_a_wrong_file_of_pairs_is_one_line_and_loses_nothing(tmp_path, content, message):
    """None stands for a folder in the file's place; what an earlier run left in --out stays."""
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    out.mkdir()
    for name in ("sft.pt", "metrics.jsonl", "state.pt"):
        (out / name).write_text("kept")
    path.mkdir() if content is None else path.write_bytes(content)
    code, printed = finish("--data", path, "--tokenizer", "toy", "--device", "cpu", "--out", out)
    assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
    assert all((out / name).read_text() == "kept" for name in os.listdir(out))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_story_runs_on_the_gpu(tmp_path, dtype):
    train.main([*TINY[:-2], "--device", "cuda", "--dtype", dtype, "--out", str(tmp_path)])
    dpo = dpo_metrics(tmp_path)
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-2) and dpo[-1]["loss"] != dpo[0]["loss"]
