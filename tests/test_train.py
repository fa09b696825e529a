"""train.py: the command line, the stages, and one small run that must beat a bar on held-out prompts."""
import copy
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
from train import Config

ROOT = os.path.dirname(os.path.abspath(train.__file__))
TOKENIZER = data.toy_tokenizer()
TINY = "--n_layer 1 --n_embd 16 --sft_steps 3 --steps 3 --pairs 100 --reviews 100 --device cpu".split()


def run(*arguments):
    return subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *map(str, arguments)],
                          capture_output=True, text=True)


def read_metrics(folder):
    with open(folder / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def tiny_model(**shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(TOKENIZER.n_vocab, **{"n_layer": 1, "n_head": 2, "n_embd": 16} | shape))


def tiny_pairs(n=12):
    """Pairs of unequal lengths, as ids."""
    rng, prompts = np.random.default_rng(0), data.prompts()[0]
    drawn = [data.corpus(prompts[:1], n, rng) for _ in range(2)]
    return [(*data.encode(TOKENIZER, x, y_w), data.encode(TOKENIZER, x, y_l)[1])
            for (x, y_w), (_, y_l) in zip(*drawn)]


class Silent:
    """A log that keeps the metrics of each step."""
    def __init__(self):
        self.metrics = []
    def start(self, stage, steps, **parts):
        return 0
    def step(self, step, metrics, tokens):
        self.metrics.append(metrics)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One small run of the whole story, piped: (finished process, its folder)."""
    out = tmp_path_factory.mktemp("small")
    return run("--sft_steps", 700, "--steps", 500, "--pairs", 16384, "--device", "cpu", "--out", out), out


def test_a_small_run_beats_the_bar_on_held_out_prompts(small):
    process, out = small
    assert process.returncode == 0, process.stderr
    report = read_metrics(out)[-1]
    assert set(report) >= {"report/" + name for name in (
        "sft/reward sft/valid dpo/reward dpo/kl dpo/valid dpo/win_rate limit/reward "
        "implicit_reward_correlation dpo/accuracy limit/accuracy").split()}
    assert report["report/sft/reward"] < 0.6 and report["report/dpo/reward"] > 2.5
    assert 0.95 < report["report/dpo/reward"] / report["report/limit/reward"] < 1
    assert report["report/dpo/valid"] > 0.99 and report["report/dpo/win_rate"] > 0.85
    assert report["report/implicit_reward_correlation"] > 0.95
    assert 0.97 < report["report/dpo/accuracy"] / report["report/limit/accuracy"] < 1


def test_metrics_hold_every_step_under_the_fields_names(small):
    metrics = read_metrics(small[1])
    sft = [m for m in metrics if m.get("stage") == "SFT"]
    dpo = [m for m in metrics if m.get("stage") == "DPO"]
    assert [m["step"] for m in sft] == list(range(1, 701)) and [m["step"] for m in dpo] == list(range(1, 501))
    assert set(dpo[0]) == {"stage", "step", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
                           "rewards/margins", "logps/chosen", "logps/rejected"}
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference agree
    assert dpo[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert np.mean([m["loss"] for m in dpo[-50:]]) < 0.5


def test_output_fits_80_columns_and_shows_ten_lines_a_stage_when_piped(small):
    lines = small[0].stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "\r" not in small[0].stdout
    assert sum(line.startswith("DPO  ") and "/500 " in line for line in lines) == 10
    assert small[0].stderr == ""


def test_checkpoints_load_as_plain_weights_and_the_reference_is_not_the_policy(small):
    sft, dpo = (torch.load(small[1] / name, weights_only=True) for name in ("sft.pt", "dpo.pt"))
    for checkpoint in (sft, dpo):
        GPT(GPTConfig(**checkpoint["config"])).load_state_dict(checkpoint["model"])
        assert all(p.dtype == torch.float32 for p in checkpoint["model"].values())
    assert not torch.equal(sft["model"]["wte.weight"], dpo["model"]["wte.weight"])
    assert sorted(os.listdir(small[1])) == ["dpo.pt", "metrics.jsonl", "sft.pt", "state.pt"]


def test_the_same_seed_gives_the_same_metrics_and_another_seed_gives_others(tmp_path):
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        train.main([*TINY, "--seed", str(seed), "--out", str(tmp_path / name)])
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") != read_metrics(tmp_path / "c")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_with_float32_weights(tmp_path, dtype):
    train.main([*TINY, "--dtype", dtype, "--out", str(tmp_path)])
    metrics = [m for m in read_metrics(tmp_path) if m.get("stage") == "DPO"]
    assert all(math.isfinite(m["loss"]) for m in metrics) and metrics[-1]["loss"] != metrics[0]["loss"]
    assert torch.load(tmp_path / "dpo.pt", weights_only=True)["model"]["wte.weight"].dtype == torch.float32


@pytest.mark.parametrize("arguments, message", [
    (["--beta", "0"], "expected beta in [1e-09, 4294967296), got 0.0"),
    (["--beta", "nan"], "expected beta in [1e-09, 4294967296), got nan"),
    (["--label_smoothing", "0.5"], "expected label_smoothing in [0, 0.5), got 0.5"),
    (["--learning_rate", "0"], "expected learning_rate in [1e-12, 4294967296), got 0.0"),
    (["--steps", "0"], "expected steps in [1, 4294967296), got 0"),
    (["--seed", "-1"], "expected seed in [0, 4294967296), got -1"),
    (["--held_out", "1"], "expected held_out in [1e-09, 1), got 1.0"),
    (["--device", "tpu"], "expected device auto, cpu, cuda, got tpu"),
    (["--dtype", "int8"], "expected dtype auto, float32, bfloat16, float16, got int8"),
    (["--tokenizer", "gpt2"], "--device cuda needs a GPU, and --tokenizer gpt2 needs --data")])
def test_an_impossible_value_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError) as refused:
        train.parse_config(arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize("arguments, message", [
    (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
    (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    (["--stepz", "3"], "unrecognized arguments: --stepz 3"), (["--ste", "3"], "unrecognized arguments: --ste 3")])
def test_a_flag_that_does_not_parse_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("flag, value, message", [
    ("--beta", 0, "expected beta in [1e-09, 4294967296), got 0.0"),
    ("--n_head", 3, "expected n_embd to be a multiple of n_head = 3, got 64")])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(tmp_path, flag, value, message):
    process = run(flag, value, "--out", tmp_path / "out")
    assert process.returncode == 2 and process.stdout == "" and process.stderr == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        Config(device="cuda")


def test_an_out_folder_that_cannot_be_made_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("kept")
    process = run(*TINY, "--out", tmp_path / "file")
    assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_every_option_has_a_flag_a_help_text_and_reaches_the_config(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for f in train.fields(Config):
        assert f"--{f.name} " in text and f.metadata["help"].split()[0] in text
    cfg = train.parse_config(["--beta", "0.5", "--steps", "7", "--out", "x", "--label_smoothing", "0.1"])
    assert (cfg.beta, cfg.steps, cfg.out, cfg.label_smoothing) == (0.5, 7, "x", 0.1)
    assert Config().device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_weights_are_float32_and_do_not_decay():
    """Decay pulls to zero, not to the reference. In bfloat16 a weight of 0.02 would not move at all
    by a step of 1e-6; in float32, under bfloat16 autocast, nearly every weight does."""
    assert train.ADAMW["weight_decay"] == 0
    cfg = Config(steps=1, batch_size=12, learning_rate=1e-6, dtype="bfloat16", device="cpu")
    sft, pairs = tiny_model(), tiny_pairs()
    policy = copy.deepcopy(sft)
    train.fit(policy, pairs, cfg, Silent(), train.score(sft, pairs, cfg))
    moved = (policy.h[0].mlp.c_fc.weight != sft.h[0].mlp.c_fc.weight).float().mean()
    assert moved > 0.9 and policy.wte.weight.dtype == torch.float32


def test_the_rate_warms_up_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(1.0) and rates[99] < 0.001
    assert max(rates) == pytest.approx(1.96, abs=0.02) and np.argmax(rates) == 9
    assert 0 < train.learning_rate(0, 1, 2.0) <= 2.0


def test_sft_lowers_the_completions_loss_and_does_not_score_the_prompt():
    """The first loss is that of the completion alone: about 3.3 tokens × ln 299, not 10."""
    model, log = tiny_model(), Silent()
    rows = [data.encode(TOKENIZER, x, y) for x, y in data.corpus(data.prompts()[0], 500, np.random.default_rng(0))]
    train.fit(model, rows, Config(sft_steps=60, device="cpu"), log)
    tokens = np.mean([len(y) for _, y in rows])
    assert log.metrics[0]["loss"] == pytest.approx(tokens * math.log(299), rel=0.1)
    assert log.metrics[-1]["loss"] < 0.8 * log.metrics[0]["loss"]


def test_dpo_moves_the_policy_and_leaves_the_reference_alone():
    """Were the two to share storage the loss would stay at ln 2; after one step it is below."""
    cfg, pairs, log = Config(steps=2, batch_size=12, device="cpu"), tiny_pairs(), Silent()
    sft = tiny_model()
    before = copy.deepcopy(sft.state_dict())
    policy = copy.deepcopy(sft)
    assert not {p.data_ptr() for p in sft.parameters()} & {p.data_ptr() for p in policy.parameters()}
    train.fit(policy, pairs, cfg, log, train.score(sft, pairs, cfg))
    first, second = (m["loss"] for m in log.metrics)
    assert first == pytest.approx(math.log(2), abs=1e-5) and second < first - 1e-4
    assert all(torch.equal(before[name], p) for name, p in sft.state_dict().items())
    assert not torch.equal(policy.wte.weight, sft.wte.weight)


def test_reference_scores_follow_their_pair_through_the_shuffle():
    """In every shuffled batch of the first epoch policy and reference agree, so the loss stays ln 2
    at a rate of 1e-9. A reference paired with other examples would show."""
    cfg, pairs, log = Config(steps=6, batch_size=4, learning_rate=1e-9, device="cpu"), tiny_pairs(24), Silent()
    sft = tiny_model()
    train.fit(copy.deepcopy(sft), pairs, cfg, log, train.score(sft, pairs, cfg))
    assert [m["loss"] for m in log.metrics] == pytest.approx([math.log(2)] * 6, abs=1e-5)
    assert len({round(m["logps/chosen"], 4) for m in log.metrics}) == 6


def test_beta_and_label_smoothing_reach_the_loss():
    pairs, results = tiny_pairs(), {}
    for options in ({}, {"beta": 0.2}, {"label_smoothing": 0.3}):
        cfg, log, sft = Config(steps=3, batch_size=12, device="cpu", **options), Silent(), tiny_model()
        train.fit(copy.deepcopy(sft), pairs, cfg, log, train.score(sft, pairs, cfg))
        results[str(options)] = log.metrics[-1]["loss"]
    assert len(set(results.values())) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_and_reference_under_the_same_autocast_start_at_exactly_ln_2(dtype):
    cfg, pairs, model = Config(dtype=dtype, device="cpu"), tiny_pairs(), tiny_model()
    ref_logps, logps = train.score(model, pairs, cfg), train.logps_of(model.train(), pairs, cfg)
    assert ref_logps.dtype == logps.dtype == torch.float32 and logps.shape == (12, 2)
    assert torch.equal(dpo_loss(*logps.T, *ref_logps.T, 1.0)[0], torch.full((12,), math.log(2)))
    other = train.score(model, pairs, Config(dtype="float32", device="cpu"))
    assert (dtype == "float32") == torch.equal(other, ref_logps)


def test_batch_composition_changes_no_log_probability(monkeypatch):
    cfg, model, pairs = Config(device="cpu"), tiny_model(), tiny_pairs(24)
    alone = torch.cat([train.logps_of(model, [pair], cfg) for pair in pairs])
    for tokens in (60, 2**13):  # a few pairs at once, and all
        monkeypatch.setattr(train, "TOKENS_AT_ONCE", tokens)
        assert torch.allclose(train.score(model, pairs, cfg), alone, atol=1e-5)


class Weights(Silent):
    """A log that keeps the gradients that the optimizer was given at each step."""
    def start(self, stage, steps, model, **parts):
        self.model, self.gradients = model, []
        return 0
    def step(self, step, metrics, tokens):
        super().step(step, metrics, tokens)
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 50])
def test_accumulated_gradients_of_unequal_parts_are_those_of_the_whole_batch(parts):
    """Seven pairs in parts of 4 + 3, 3 + 2 + 2, … give one mean, and the same metrics."""
    pairs, logs, sft = tiny_pairs(7), [], tiny_model().double()
    for grad_accum in (1, parts):
        cfg = Config(steps=3, batch_size=7, device="cpu", grad_accum=grad_accum)
        logs.append(Weights())
        train.fit(copy.deepcopy(sft), pairs, cfg, logs[-1], train.score(sft, pairs, cfg) + 0.1)
    for whole, accumulated in zip(*(log.gradients for log in logs)):
        assert torch.allclose(whole, accumulated, rtol=1e-9, atol=1e-13) and whole.norm() > 0.1
    for whole, accumulated in zip(*(log.metrics for log in logs)):
        assert whole == pytest.approx(accumulated, rel=1e-9)


def test_evaluation_leaves_the_random_state_the_mode_and_the_gradients_alone():
    cfg, model = Config(device="cpu"), tiny_model()
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    policy = copy.deepcopy(model)
    with torch.no_grad():
        policy.ln_f.weight *= 3
    figures = train.report_exactly(model, policy, data.prompts()[1][:2], cfg, TOKENIZER)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and str(np.random.get_state()) == numpy_state
    assert figures["report/sft/kl"] == 0 < figures["report/dpo/kl"]
    assert figures["report/sft/win_rate"] == pytest.approx(0.5)


def test_pairs_are_two_samples_to_a_prompt_without_identical_ones(capsys):
    model, cfg = tiny_model(), Config(pairs=400, device="cpu")
    with torch.no_grad():  # a model that often says nothing at all, so that identical pairs occur
        model.ln_f.bias[0] = 3
        model.wte.weight[TOKENIZER.eot_token, 0] = 2
    prompts = data.prompts()[0]
    pairs = train.make_pairs(model, prompts, cfg, TOKENIZER)
    assert 0 < len(pairs) < 400 and f"{400 - len(pairs)} identical dropped" in capsys.readouterr().out
    assert all(chosen != rejected for _, chosen, rejected in pairs)
    assert {TOKENIZER.decode(x) for x, _, _ in pairs} <= set(prompts)
    assert all(1 <= len(y) <= data.MAX_NEW_TOKENS for _, *both in pairs for y in both)


def test_the_chosen_answer_is_the_better_one_as_often_as_bradley_terry_says(small):
    model = GPT.load(small[1] / "sft.pt", TOKENIZER.n_vocab)
    pairs = train.make_pairs(model, data.prompts()[0], Config(pairs=4000, seed=7, device="cpu"), TOKENIZER)
    worth = lambda x, y: data.reward(TOKENIZER.decode(x), data.decode(TOKENIZER, y))
    gaps = np.array([worth(x, y_w) - worth(x, y_l) for x, y_w, y_l in pairs])
    expected = np.mean(1 / (1 + np.exp(-abs(gaps[gaps != 0]))))
    assert np.mean(gaps[gaps != 0] > 0) == pytest.approx(expected, abs=0.02)


PAIRS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pairs.jsonl")


def test_own_pairs_from_a_file_teach_on_prompts_that_were_held_out(tmp_path):
    """200 pairs of real sentences, in which short, direct answers are preferred to evasive ones."""
    process = run("--data", PAIRS, "--tokenizer", "toy", "--sft_steps", 150, "--steps", 40, "--batch_size", 32,
                  "--held_out", 0.2, "--learning_rate", 3e-4, "--device", "cpu", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    assert "to train on" in process.stdout and max(map(len, process.stdout.splitlines())) <= 80
    metrics = read_metrics(tmp_path)
    first, report = next(m for m in metrics if m.get("stage") == "DPO"), metrics[-1]
    assert first["rewards/accuracies"] == 0.5 and first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert report["report/rewards/accuracies"] > 0.85 and report["report/rewards/margins"] > 0.5
    assert report["report/loss"] < 0.5 and report["report/logps/chosen_change"] > report["report/logps/rejected_change"]
    assert 0 < report["report/kl_error"] < 5 and report["report/kl"] > -3 * report["report/kl_error"]
    gap = report["report/logps/chosen_change"] - report["report/logps/rejected_change"]
    assert report["report/rewards/margins"] == pytest.approx(gap, rel=1e-4)  # β = 1


def test_init_starts_from_a_checkpoint_and_sft_can_be_skipped(small, tmp_path, capsys):
    sft = small[1] / "sft.pt"
    train.main([*TINY, "--init", str(sft), "--sft_steps", "0", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("\n100 pairs: ")
    before, after = (torch.load(path, weights_only=True) for path in (sft, tmp_path / "sft.pt"))
    assert before["config"] == after["config"] and before["config"]["n_embd"] == 64  # not the flag's 16
    assert all(torch.equal(before["model"][name], p) for name, p in after["model"].items())
    assert all(m["stage"] == "DPO" for m in read_metrics(tmp_path)[:-1])


def test_init_of_another_vocabulary_or_of_no_model_is_refused(tmp_path):
    torch.save({"config": {"vocab_size": 11}, "model": GPT(GPTConfig(11)).state_dict()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: expected a vocabulary of 299, the tokenizer's, got 11"):
        train.main([*TINY, "--init", str(tmp_path / "other.pt"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="pairs.jsonl: not a checkpoint, or damaged"):
        train.main([*TINY, "--init", PAIRS, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, message", [
    (b"", "expected a pair, got an empty file"), (b"{\n", "1: Expecting property name"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "expected usable pairs of two prompts or more, got 1"), (None, "")])
def test_a_wrong_file_of_pairs_is_one_line_and_loses_nothing(tmp_path, content, message):
    """None stands for a folder in the file's place; what an earlier run left in --out stays."""
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    out.mkdir()
    for name in ("sft.pt", "metrics.jsonl", "state.pt"):
        (out / name).write_text("kept")
    path.mkdir() if content is None else path.write_bytes(content)
    process = run("--data", path, "--tokenizer", "toy", "--device", "cpu", "--out", out)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1 and message in process.stderr
    assert all((out / name).read_text() == "kept" for name in os.listdir(out))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_story_runs_on_the_gpu(tmp_path, dtype):
    train.main([*TINY[:-2], "--device", "cuda", "--dtype", dtype, "--out", str(tmp_path)])
    dpo = [m for m in read_metrics(tmp_path) if m.get("stage") == "DPO"]
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-2) and dpo[-1]["loss"] != dpo[0]["loss"]
