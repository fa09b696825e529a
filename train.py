# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""The pipeline of DPO: SFT -> preference pairs -> reference -> DPO -> report.

    python train.py                        # the built-in toy task: 40 to 70 s on a CPU core
    python train.py --data pairs.jsonl --init pytorch_model.bin    # your pairs, from GPT-2

It writes sft.pt, dpo.pt, metrics.jsonl (every step) and state.pt (for --resume) to --out.
"""
import argparse
import collections
import copy
import functools
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
from data import Pair, Row, ScoredPair
from dpo import dpo_loss, optimal_logps, preference_metrics, sequence_logps
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

MAX_TOKENS = 4096  # tokens, with padding, in a batch without gradient
EVALUATED = 256  # held-out pairs that are evaluated, during DPO and in the report
FILES = ("state.pt", "metrics.jsonl", "sft.pt", "dpo.pt")  # of a run, in --out
COLUMNS = {  # printed metrics, with their labels; SFT has only a loss
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
    "logps/chosen": "chosen", "logps/rejected": "rejected",
    "eval/loss": "held-out", "eval/rewards/accuracies": "accuracy"}


def main(arguments=None):
    try:  # Everything that you provide is read here. Its errors are one line, without traceback.
        cfg = parse_settings(arguments)
        model = None if cfg.init is None else load_model(cfg)
        task = ToyTask(cfg) if cfg.data is None else FileTask(cfg)
        run = Run(cfg, task.checksum)
    except (OSError, ValueError) as error:
        fail(error)
    sft = prepare(model, task.tokenizer, cfg)

    # 1. Supervised fine-tuning (SFT): maximum likelihood of the corpus.
    corpus = task.corpus()
    mean_length = np.mean([len(row.completion) for row in corpus])
    run_stage(run, "SFT", sft, corpus, functools.partial(sft_objective, mean_length=mean_length),
              steps=cfg.sft_steps, peak=cfg.sft_learning_rate, held_out_pairs=[])
    sft.save(run.out / "sft.pt")

    # 2. Preference pairs: from your file, or samples of the SFT model that are labelled here.
    pairs, held_out_pairs = task.pairs(sft)
    print_pairs(pairs[:2], task.tokenizer)

    # 3. The reference is the SFT model, now frozen. It scores every pair once.
    reference = sft.requires_grad_(False)
    scored_pairs = score_pairs(reference, pairs, cfg)
    scored_held_out_pairs = score_pairs(reference, held_out_pairs[:EVALUATED], cfg)

    # 4. DPO: the policy is a copy of the reference. Its objective uses β = cfg.beta.
    policy = copy.deepcopy(reference).requires_grad_(True)
    run_stage(run, "DPO", policy, scored_pairs, dpo_objective,
              steps=cfg.steps, peak=cfg.learning_rate, held_out_pairs=scored_held_out_pairs)
    policy.save(run.out / "dpo.pt")

    # 5. The report, on held-out prompts.
    figures = task.report(reference, policy)
    run.log(**{f"report/{name}": value for name, value in figures.items()})


def completion_logps(model, rows, cfg):
    """log π(y|x) of a batch of rows: (B,), nats. The network runs under autocast to cfg.dtype; the
    log-softmax and the sum are in float32."""
    tokens, mask = data.collate(rows, cfg.device)
    with torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
        return sequence_logps(model(tokens, scored=mask), tokens, mask)


@torch.no_grad()
def score(model, rows, cfg):
    """log π(y|x) of any number of rows, in their order and without gradient: (len(rows),), nats."""
    lengths = [data.length(row) for row in rows]
    batches = [[]]  # of row numbers
    for i in np.argsort(lengths, kind="stable"):  # row i is the longest so far
        if batches[-1] and lengths[i] * (len(batches[-1]) + 1) > MAX_TOKENS:
            batches.append([])
        batches[-1].append(i)
    logps = [completion_logps(model, [rows[i] for i in batch], cfg)
             for batch in data.progress(batches, f"of {len(batches):,} batches scored")]
    return torch.cat(logps)[np.argsort(np.concatenate(batches))]


def sft_objective(model, rows, cfg, mean_length):
    """Losses (B,): -log π(y|x) / mean_length, and no metrics. mean_length is that of the corpus, so
    the mean loss is in nats per token. A constant weights all tokens equally."""
    return -completion_logps(model, rows, cfg) / mean_length, {}


def rows_of(pairs):
    """The chosen rows of all pairs, then their rejected rows."""
    return [Row(p.prompt, p.chosen) for p in pairs] + [Row(p.prompt, p.rejected) for p in pairs]


def dpo_objective(policy, pairs, cfg):
    """Losses (B,) and metrics {name: (B,)} of a batch of ScoredPairs."""
    return pair_losses(completion_logps(policy, rows_of(pairs), cfg), pairs, cfg)


def pair_losses(policy_logps, pairs, cfg):
    """Losses and metrics of ScoredPairs from the policy's log π(y|x) of rows_of(pairs)."""
    policy_chosen_logps, policy_rejected_logps = policy_logps.chunk(2)
    ref_chosen_logps = policy_logps.new_tensor([p.ref_chosen_logp for p in pairs])
    ref_rejected_logps = policy_logps.new_tensor([p.ref_rejected_logp for p in pairs])
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, cfg.beta,
        label_smoothing=cfg.label_smoothing)
    return losses, preference_metrics(chosen_rewards, rejected_rewards,
                                      policy_chosen_logps, policy_rejected_logps)


def score_pairs(reference, pairs, cfg):
    """Pairs to ScoredPairs: add log π_ref(y|x) of both completions."""
    logps = score(reference, rows_of(pairs), cfg).tolist() if pairs else []
    return [ScoredPair(*pair, logps[i], logps[i + len(pairs)]) for i, pair in enumerate(pairs)]


def evaluate(policy, pairs, cfg):
    """Mean DPO loss and metrics of any number of ScoredPairs, without gradient: {name: number}."""
    losses, metrics = pair_losses(score(policy, rows_of(pairs), cfg), pairs, cfg)
    return {name: values.mean().item() for name, values in {"loss": losses, **metrics}.items()}


def fit(model, optimizer, batches, objective, steps, peak, cfg, done=0):
    """The training loop, a generator: yields (step, means of the batch {name: number}).

    batches    iterator of lists of examples; each is split into up to cfg.grad_accum micro-batches
    objective  (model, examples, cfg) -> losses (B,), metrics {name: (B,)}
    steps      of the whole stage; done of them were finished by an earlier run
    raises FloatingPointError if a loss or gradient is not finite; the weights are then unchanged
    """
    for step in range(done + 1, steps + 1):
        batch = next(batches)
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, steps, peak)
        optimizer.zero_grad()
        sums = collections.defaultdict(float)
        size = math.ceil(len(batch) / cfg.grad_accum)
        for i in range(0, len(batch), size):
            losses, metrics = objective(model, batch[i:i + size], cfg)
            (losses.sum() / len(batch)).backward()  # for one micro-batch: losses.mean().backward()
            for name, values in {"loss": losses.detach(), **metrics}.items():
                sums[name] += values.sum()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # it limits outliers
        means = {name: (total / len(batch)).item() for name, total in sums.items()}
        if not (math.isfinite(means["loss"]) and norm.isfinite()):
            raise FloatingPointError(f"step {step}: loss {means['loss']}, norm of the gradient "
                                     f"{norm}; is the learning rate {peak:g} too high?")
        optimizer.step()
        yield step, means


def warmup_cosine(step, steps, peak):
    """Learning rate of step 1, …, steps: up to peak in the first tenth, then a cosine towards 0."""
    warmup = math.ceil(steps / 10)
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2


def run_stage(run, stage, model, examples, objective, steps, peak, held_out_pairs):
    """Run the rest of a stage. Log each step, and save every cfg.save_every steps. After each tenth
    of the steps, evaluate held_out_pairs and print the means since the last row."""
    cfg = run.cfg
    # The paper uses RMSprop. Weight decay would pull the weights to 0, not to the reference.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    done = run.restore(stage, model, optimizer)
    if done == 0:  # a resumed run then starts from the same weights
        run.save(stage, 0, model, optimizer if steps else None)
    batches = data.batches(examples, cfg.batch_size, cfg.seed)
    batches = itertools.islice(batches, done, None)  # skip those that an earlier run used
    names = [name for name in COLUMNS if name == "loss" or stage == "DPO"]
    names = [name for name in names if held_out_pairs or "eval/" not in name]
    if done < steps:
        print(f"\n{'step':>13}", *(f"{COLUMNS[name]:>8}" for name in names), "ETA")
    recent, began = [], time.perf_counter()
    for step, metrics in fit(model, optimizer, batches, objective, steps, peak, cfg, done):
        is_tenth = 10 * step // steps > 10 * (step - 1) // steps
        if is_tenth and held_out_pairs:
            means = evaluate(model, held_out_pairs, cfg)
            metrics |= {f"eval/{name}": mean for name, mean in means.items()}
        run.log(stage=stage, step=step, **metrics)
        recent.append(metrics)
        if is_tenth:
            means = [np.mean([row[name] for row in recent if name in row]) for name in names]
            left = (time.perf_counter() - began) / (step - done) * (steps - step)
            print_row(stage, step, steps, means, left)
            recent = []
        if step % cfg.save_every == 0 or step == steps:
            run.save(stage, step, model, optimizer if step < steps else None)
    optimizer.zero_grad()  # frees the gradients


def print_row(stage, step, steps, means, seconds_left):
    position = f"{step}/{steps}" if steps < 10**4 else f"{step:,}"
    cells = [f"{mean:8.3f}" if abs(mean) < 1000 else f"{mean:8.1e}" for mean in means]
    eta = f"{seconds_left:.0f}s" if seconds_left < 100 else f"{seconds_left / 60:.0f}m"
    print(f"{stage:4}{position:>9}", *cells, f"{eta:>3}", flush=True)


class Run:
    """The folder --out. --resume continues from its state.pt. That holds no random state, because
    the seed determines data, labels, samples and batches."""

    def __init__(self, cfg, checksum):
        """Open a new folder or, with --resume, an earlier run's. Raises ValueError or OSError."""
        self.cfg, self.out = cfg, Path(cfg.out)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {cfg.out}: expected a folder, but it is a file")
        may_differ = ("data", "out", "save_every", "resume")
        settings = {name: x for name, x in asdict(cfg).items() if name not in may_differ}
        settings["checksum of the texts in --data"] = checksum
        if cfg.resume:
            self.state = self.load_state(settings)
        elif any((self.out / name).exists() for name in FILES):
            raise ValueError(f"{cfg.out} holds an earlier run: continue it with --resume, or "
                             "choose another folder with --out")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            self.state = {"settings": settings, "metrics_size": 0}
            save_checkpoint(self.out / "state.pt", self.state)
        self.metrics = open(self.out / "metrics.jsonl", "ab")
        self.metrics.truncate(self.state["metrics_size"])
        self.metrics.seek(0, 2)  # to the new end, which save asks for

    def load_state(self, settings):
        """The state of an earlier run with these settings. Raises ValueError or OSError."""
        path, metrics = self.out / "state.pt", self.out / "metrics.jsonl"
        if not path.exists():
            raise ValueError(f"{self.out}: there is no state.pt to continue from; leave out "
                             "--resume, or choose another folder with --out")
        state = load_checkpoint(path)
        if "settings" not in state:
            raise ValueError(f"{path}: not the state of a run")
        for name, now in settings.items():
            saved = state["settings"].get(name)
            if saved != now:
                raise ValueError(f"{path}: {name} was {saved}, now it is {now}")
        if metrics.stat().st_size < state["metrics_size"]:
            raise ValueError(f"{metrics} is shorter than when state.pt was saved; restore it "
                             "or start anew with another --out")
        return state

    def restore(self, stage, model, optimizer):
        """Restore the weights and the optimizer of a stage. Returns the number of steps done."""
        done, weights, moments = self.state.get(stage, (0, None, None))
        if weights:
            model.load_state_dict(weights)
        if moments:
            optimizer.load_state_dict(moments)
        return done

    def save(self, stage, done, model, optimizer):
        """Save the state after done steps of a stage. After the last one, optimizer is None."""
        self.state[stage] = done, model.state_dict(), optimizer and optimizer.state_dict()
        self.state["metrics_size"] = self.metrics.tell()
        save_checkpoint(self.out / "state.pt", self.state)

    def log(self, **row):
        """Append a line to metrics.jsonl. JSON has no NaN: a number that is not finite is null."""
        row = {key: x if isinstance(x, str) or math.isfinite(x) else None for key, x in row.items()}
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()


class ToyTask:
    """The toy task. Its pairs are samples of the SFT model, labelled by a simulated annotator."""

    def __init__(self, cfg):
        if cfg.tokenizer != "toy":
            raise ValueError("the toy task needs the tokenizer toy; give your pairs with --data")
        self.cfg, self.tokenizer = cfg, data.toy_tokenizer()
        self.prompts, self.held_out_prompts = data.prompts()
        self.checksum = 0  # its texts follow from the seed

    def corpus(self):
        rng = np.random.default_rng((self.cfg.seed, 1))
        reviews = data.corpus(self.prompts, self.cfg.n_reviews, rng)
        return [data.encode(self.tokenizer, x, y) for x, y in reviews]

    def pairs(self, sft):
        pairs = make_pairs(sft, self.prompts, self.cfg.n_pairs, self.cfg, self.tokenizer)
        print(f"\n{self.cfg.n_pairs:,} pairs sampled, {len(pairs):,} kept (the rest are identical)")
        if not pairs:
            fail("all sampled pairs are identical; more --n_pairs or --sft_steps may help")
        return pairs, make_pairs(sft, self.held_out_prompts, EVALUATED, self.cfg, self.tokenizer)

    def report(self, reference, policy):
        cfg = replace(self.cfg, dtype="float32")
        prompts = [self.tokenizer.encode_ordinary(x) for x in self.held_out_prompts]
        return report_exactly(reference, policy, self.held_out_prompts, cfg, self.tokenizer) | \
            report_samples(reference, policy, prompts, data.MAX_NEW_TOKENS, cfg, self.tokenizer)


def print_pairs(pairs, tokenizer):
    for pair in pairs:
        x, y_w, y_l = (tokenizer.decode(ids) for ids in pair)
        print(f"{x!r:.80}\n    chosen   {y_w!r:.67}\n    rejected {y_l!r:.67}")


def make_pairs(sft, prompts, n, cfg, tokenizer):
    """Sample n pairs of completions y ~ π_SFT(·|x). A simulated annotator chooses: [Pair]."""
    texts = [prompts[i % len(prompts)] for i in range(n)]
    ids = [tokenizer.encode_ordinary(x) for x in texts]
    samples = sample(sft, ids + ids, data.MAX_NEW_TOKENS, cfg, tokenizer)
    rewards = [data.reward(x, data.decode(tokenizer, y)) for x, y in zip(texts + texts, samples)]
    rng = np.random.default_rng((cfg.seed, 2))
    first_wins = data.prefers_first(rewards[:n], rewards[n:], rng)
    pairs = []
    for x, first, second, wins in zip(ids, samples[:n], samples[n:], first_wins):
        chosen, rejected = (first, second) if wins else (second, first)
        if chosen != rejected:
            pairs.append(Pair(x, chosen, rejected))
    return pairs


class FileTask:
    """Your own pairs (--data). SFT trains on their chosen completions."""

    def __init__(self, cfg):
        self.cfg, self.tokenizer = cfg, data.get_tokenizer(cfg.tokenizer)
        pairs, counts, self.checksum = data.encode_pairs(
            data.read_jsonl(cfg.data), self.tokenizer, cfg.block_size)
        self.training_pairs, self.held_out_pairs = data.split_pairs(
            pairs, cfg.held_out, cfg.block_size, cfg.seed)
        total = counts.pop("in the file", 0)
        if len(pairs) < 0.8 * total:
            print(f"Warning: {total - len(pairs):,} of {total:,} pairs are dropped.")
        counts = {f"pairs in {cfg.data}": total, "to train on": len(self.training_pairs),
                  f"held out (--held_out {cfg.held_out:g})": len(self.held_out_pairs), **counts}
        print(*(f"{n:10,} {text}" for text, n in counts.items()), sep="\n")
        if not pairs:
            raise ValueError(f"{cfg.data}: no pair to train on")
        mean_lengths = np.mean([(len(y_w), len(y_l)) for _, y_w, y_l in pairs], axis=0)
        print("mean length: chosen {:.1f}, rejected {:.1f} tokens".format(*mean_lengths))

    def corpus(self):
        return [Row(x, y_w) for x, y_w, _ in self.training_pairs]

    def pairs(self, sft):
        return self.training_pairs, self.held_out_pairs

    def report(self, reference, policy):
        cfg = replace(self.cfg, dtype="float32")
        pairs = self.held_out_pairs or self.training_pairs
        kind = "held-out pairs" if self.held_out_pairs else "training pairs (none is held out)"
        figures = evaluate(policy, score_pairs(reference, pairs[:EVALUATED], cfg), cfg)
        print(f"\n{len(pairs[:EVALUATED])} {kind}; before DPO: loss 0.693, margin 0")
        for name, value in figures.items():
            print(f"    {name:22}{value:9.3f}")
        room = cfg.block_size // 2  # for a prompt; no completion that was kept is longer
        prompts = list(dict.fromkeys(tuple(pair.prompt[-room:]) for pair in pairs))[:32]
        return figures | report_samples(reference, policy, prompts, room, cfg, self.tokenizer)


def sample(model, prompts, max_new_tokens, cfg, tokenizer):
    """One completion y ~ π(·|x) per prompt, as ids. The same arguments give the same samples."""
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    n = max(1, 2 * MAX_TOKENS // (max(map(len, prompts)) + max_new_tokens))
    starts = range(0, len(prompts), n)
    samples = []
    for i in data.progress(starts, f"of {len(starts):,} batches sampled"):
        samples += model.sample(prompts[i:i + n], max_new_tokens, 1.0, tokenizer.eot_token,
                                generator)
    return samples


def outcome_logps(model, prompts, cfg, tokenizer):
    """log π of all 1,884 reviews and, last, of all malformed text together: (X, 1885), float64."""
    completions = [data.encode(tokenizer, "", y).completion for y in data.REVIEWS]
    rows = [Row(tokenizer.encode_ordinary(x), y) for x in prompts for y in completions]
    logps = score(model, rows, cfg).view(len(prompts), -1).cpu().double()
    malformed = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
    return torch.cat([logps, malformed], dim=-1)


def report_exactly(reference, policy, prompts, cfg, tokenizer):
    """Print and return the exact figures of SFT, DPO and the optimum (Eq. 4)."""
    rewards = data.outcome_rewards(prompts)
    logps = {"sft": outcome_logps(reference, prompts, cfg, tokenizer),
             "dpo": outcome_logps(policy, prompts, cfg, tokenizer)}
    logps["optimum"] = optimal_logps(logps["sft"], rewards, cfg.beta)
    table = {name: data.exact_figures(policy_logps, logps["sft"], rewards, cfg.beta)
             for name, policy_logps in logps.items()}
    achieved = table["dpo"]["objective"] - table["sft"]["objective"]
    achievable = table["optimum"]["objective"] - table["sft"]["objective"]
    changes = (logps["dpo"] - logps["sft"])[:, :-1]  # without malformed text
    correlations = [np.corrcoef(change, r)[0, 1] for change, r in zip(changes, rewards[:, :-1])]
    figures = {"objective_share": achieved / achievable if achievable > 0 else math.nan,
               "kl_to_optimum": (achievable - achieved) / cfg.beta,  # J(π*) - J(π) = β KL(π‖π*)
               "implicit_reward_correlation": np.mean(correlations).item()}
    print(f"\n{f'{len(prompts)} held-out prompts, exact':28}", *(f"{x.upper():>9}" for x in table))
    for key, label in data.FIGURES.items():
        print(f"{label:28}", *(f"{column[key]:9.4f}" for column in table.values()))
    print("DPO achieves {objective_share:.1%} of the achievable improvement of the objective.\n"
          "KL(π‖π*) is {kl_to_optimum:.4f} nats. Over all reviews, the implicit and the true\n"
          "reward have a correlation of {implicit_reward_correlation:.4f}.".format(**figures))
    return figures | {f"{x}/{key}": table[x][key] for x in table for key in data.FIGURES}


def report_samples(reference, policy, prompts, max_new_tokens, cfg, tokenizer):
    """Print samples of SFT and DPO. Return an estimate of DPO's KL(π‖π_ref), the mean of
    log π(y|x) - log π_ref(y|x) over one y ~ π per prompt, and its standard error."""
    samples = {"SFT": sample(reference, prompts, max_new_tokens, cfg, tokenizer),
               "DPO": sample(policy, prompts, max_new_tokens, cfg, tokenizer)}
    for i, prompt in enumerate(prompts[:4]):
        print(f"\n{tokenizer.decode(prompt)!r:.80}")
        for name, completions in samples.items():
            print(f"    {name} {data.decode(tokenizer, completions[i])!r:.71}")
    print(f"\n{len(prompts)} samples: tokens on average, and fraction that end with EOS")
    for name, completions in samples.items():
        ended = np.mean([y[-1] == tokenizer.eot_token for y in completions])
        print(f"    {name}{np.mean([len(y) for y in completions]):8.1f}{ended:8.2f}")
    rows = [Row(x, y) for x, y in zip(prompts, samples["DPO"])]
    log_ratios = score(policy, rows, cfg) - score(reference, rows, cfg)
    kl, error = log_ratios.mean().item(), math.nan  # one sample has no standard error
    if len(rows) > 1:
        error = log_ratios.std().item() / math.sqrt(len(rows))
        print(f"KL(π‖π_ref) from the samples of DPO: {kl:.3f} ± {error:.3f} nats")
    return {"kl": kl, "kl_error": error}


def option(group, default, help, low=None, high=None, choices=None):  # group: heading in --help
    metadata = {"group": group, "help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """All settings. If a default depends on --data, --init or --device, it is None here."""
    data: str = option("data", None, "JSONL file of your pairs (default: the toy task)")
    held_out: float = option("data", 0.1, "fraction of the prompts of --data to hold out", 0, 0.9)
    tokenizer: str = option("data", None, "for --data (default: gpt2)", choices=("toy", "gpt2"))
    block_size: int = option(
        "data", None, "longest row, in tokens (default: 256, with --init the model's)", 16, 8192)
    n_pairs: int = option("data", 32768, "pairs to sample in the toy task", 1, 10**7)
    n_reviews: int = option("data", 20000, "reviews for SFT in the toy task", 1, 10**7)
    init: str = option("model", None, "checkpoint or GPT-2's pytorch_model.bin to start from")
    n_layer: int = option("model", None, "transformer blocks (default: 1)", 1, 1000)
    n_head: int = option("model", None, "attention heads (default: 4)", 1, 1000)
    n_embd: int = option("model", None, "channels (default: 64)", 1, 10**5)
    sft_steps: int = option("SFT", 1000, "steps, one batch each; 0 skips SFT", 0, 10**9)
    sft_learning_rate: float = option(
        "SFT", None, "peak (default: 4e-3, with --init 1e-5)", 1e-9, 10)
    steps: int = option("DPO", 1000, "steps, one batch each", 1, 10**9)
    learning_rate: float = option("DPO", None, "peak (default: 1e-3, with --init 1e-6)", 1e-9, 10)
    beta: float = option("DPO", None, "KL penalty β (default: 1.0, with --init 0.1)", 1e-6, 1e6)
    label_smoothing: float = option("DPO", 0.0, "expected fraction of wrong labels", 0, 0.49)
    batch_size: int = option("run", 64, "completions (SFT) or pairs (DPO) per batch", 1, 10**6)
    grad_accum: int = option("run", 1, "micro-batches per batch, to save memory", 1, 10**6)
    device: str = option("run", "cuda" if torch.cuda.is_available() else "cpu",
                         "where to run; mps is not tested", choices=("cpu", "cuda", "mps"))
    dtype: str = option("run", None, "of matrix products (default: bfloat16 if the GPU has it, "
                        "else float32)", choices=("float32", "bfloat16"))
    seed: int = option("run", 0, "of weights, data, samples and batches", 0, 2**32 - 1)
    out: str = option("run", "out", "folder for the results")
    save_every: int = option("run", 100, "steps between two saved states", 1, 10**9)
    resume: bool = option("run", False, "continue the run in --out")

    def __post_init__(self):
        """Fill in the defaults and check every setting. Raises ValueError that names the flag."""
        defaults = {"sft_learning_rate": 1e-5, "learning_rate": 1e-6, "beta": 0.1}
        if self.init is None:
            defaults = {"sft_learning_rate": 4e-3, "learning_rate": 1e-3, "beta": 1.0,
                        "tokenizer": "toy" if self.data is None else "gpt2",
                        "block_size": 256, "n_layer": 1, "n_head": 4, "n_embd": 64}
        if not getattr(torch, self.device).is_available():
            raise ValueError(f"--device {self.device}: torch does not find it")
        native = self.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        defaults["dtype"] = "bfloat16" if native else "float32"
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, defaults.get(f.name))
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if low is not None and value is not None and not low <= value <= high:
                raise ValueError(f"--{f.name}: expected {low} to {high}, got {value}")
        if self.init is None and self.n_embd % self.n_head:
            raise ValueError(f"--n_head {self.n_head} does not divide --n_embd {self.n_embd}")


def parse_settings(arguments):
    """The command line as a Config."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    groups = {}
    for f in fields(Config):
        group, text = f.metadata["group"], f.metadata["help"]
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": "store_true"}
        elif f.default is not None:
            text += f" (default: {f.default})"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    return Config(**vars(parser.parse_args(arguments)))


def load_model(cfg):
    """The model of --init. Fills in the settings that it determines. Raises ValueError if one of
    them is given and does not fit."""
    model = GPT.load(cfg.init, cfg.n_head)
    for name in ("tokenizer", "block_size", "n_layer", "n_head", "n_embd"):
        given, stored = getattr(cfg, name), getattr(model.config, name)
        if given is None:
            setattr(cfg, name, stored)
        elif given != stored and not (name == "block_size" and given < stored):
            raise ValueError(f"--{name} {given}: but {cfg.init} has {stored}")
    has, needs = model.config.vocab_size, data.get_tokenizer(cfg.tokenizer).n_vocab
    if has != needs:
        raise ValueError(f"{cfg.init} has a vocabulary of {has}, but its tokenizer has {needs}")
    cfg.__post_init__()  # checks the settings that were filled in
    return model


def prepare(model, tokenizer, cfg):
    """Print the settings that matter most. Return the model of --init or a new one, on its device.
    """
    print(f"β {cfg.beta:g}, learning rates {cfg.sft_learning_rate:g} (SFT) and "
          f"{cfg.learning_rate:g} (DPO), {cfg.dtype} on {cfg.device}, seed {cfg.seed}")
    torch.manual_seed(cfg.seed)
    torch.set_flush_denormal(True)  # tiny gradients would slow a CPU down
    model = model or GPT(GPTConfig(tokenizer.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head,
                                   cfg.n_embd, cfg.tokenizer))
    if sum(p.numel() for p in model.parameters()) < 2**20:
        torch.set_num_threads(1)  # a small model is faster on one thread
    return model.to(cfg.device)


def fail(error):
    """Print one line and exit with code 2."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename or 'an empty path'}: {error.strerror}"
    print("error:", str(error).replace("\n", " "), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for a terminal without Greek letters
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; if a state was saved, --resume continues from it", file=sys.stderr)
        sys.exit(130)
    except (OSError, FloatingPointError) as error:
        fail(error)
