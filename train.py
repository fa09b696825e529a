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
import itertools
import json
import math
import os
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
from data import Pair, Row, ScoredPair
from dpo import dpo_loss, optimal_logps, preference_metrics, sequence_logps
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

MAX_TOKENS = 4096  # tokens, with padding, in a batch that is scored or sampled
EVALUATED = 256  # at most so many held-out pairs are evaluated during DPO
FILES = ("state.pt", "metrics.jsonl", "sft.pt", "dpo.pt")  # of a run, in --out
COLUMNS = {  # metrics that are printed, with their labels
    "loss": "loss", "nats_per_token": "nats/tok",
    "rewards/accuracies": "accuracy", "rewards/margins": "margin",
    "logps/chosen": "chosen", "logps/rejected": "rejected",
    "eval/loss": "held-out", "eval/rewards/accuracies": "accuracy"}


def main(arguments=None):
    try:  # All input is read and checked here. An error in it is one line, without a traceback.
        cfg = parse_settings(arguments)
        sft = make_model(cfg)
        task = ToyTask(cfg) if cfg.data is None else FileTask(cfg, sft)
        run = Run(cfg, task.checksum)
    except (OSError, ValueError) as error:
        fail(error)
    print(f"β {cfg.beta:g}, learning rates {cfg.sft_learning_rate:g} (SFT) and "
          f"{cfg.learning_rate:g} (DPO), {cfg.dtype} on {cfg.device}, seed {cfg.seed}")

    # 1. Supervised fine-tuning (SFT): maximum likelihood of reviews or of your chosen completions.
    train_stage(run, "SFT", sft, task.sft_rows(), sft_objective,
                steps=cfg.sft_steps, peak=cfg.sft_learning_rate, held_out_pairs=[])
    sft.save(run.out / "sft.pt")

    # 2. Preference pairs: from your file, or samples of the SFT model that are labelled here.
    pairs, held_out_pairs = task.pairs(sft)
    print_pairs(pairs[:2], task.tokenizer)

    # 3. The reference is the SFT model, now frozen. Because log π_ref does not change during
    # training, it is computed once, here, and travels with each pair.
    reference = sft.requires_grad_(False)
    scored_pairs = score_pairs(reference, pairs, cfg)
    scored_held_out_pairs = score_pairs(reference, held_out_pairs[:EVALUATED], cfg)

    # 4. DPO: the policy starts as a copy of the reference.
    policy = copy.deepcopy(reference).requires_grad_(True)
    train_stage(run, "DPO", policy, scored_pairs, dpo_objective,
                steps=cfg.steps, peak=cfg.learning_rate, held_out_pairs=scored_held_out_pairs)
    policy.save(run.out / "dpo.pt")

    # 5. The report, on held-out prompts if there are any, in float32, as the samples are drawn.
    figures = task.report(reference, policy, replace(cfg, dtype="float32"))
    run.log(**{f"report/{name}": value for name, value in figures.items()})


# ---- From rows to losses ----
def completion_logps(model, rows, cfg):
    """log π(y|x) of one batch of rows under a model, with gradient: (B,), nats. The network runs
    under autocast to cfg.dtype; the log-softmax and the sum are in float32."""
    tokens, mask = data.collate(rows, cfg.device)
    with torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
        return sequence_logps(model(tokens, scored=mask), tokens, mask)


def sft_objective(model, rows, cfg):
    """Losses (B,): -log π(y|x), in nats per completion. The metric nats_per_token divides each loss
    by its own length, so its mean is not the corpus's cross-entropy: all rows weigh the same."""
    losses = -completion_logps(model, rows, cfg)
    lengths = losses.new_tensor([len(row.completion) for row in rows])
    return losses, {"nats_per_token": losses.detach() / lengths}


def rows_of(pairs):
    """The chosen rows of B pairs, then their rejected rows in the same order. So if logps (2B,)
    are those of rows_of(pairs), then logps.chunk(2) gives the chosen (B,) and the rejected (B,)."""
    return [Row(p.prompt, p.chosen) for p in pairs] + [Row(p.prompt, p.rejected) for p in pairs]


def dpo_objective(policy, pairs, cfg):
    """DPO's losses (B,) and metrics {name: (B,)} of ScoredPairs. Only the policy runs here, because
    score_pairs has computed log π_ref(y|x) of each pair once, before training."""
    policy_chosen_logps, policy_rejected_logps = \
        completion_logps(policy, rows_of(pairs), cfg).chunk(2)
    ref_chosen_logps = policy_chosen_logps.new_tensor([p.ref_chosen_logp for p in pairs])
    ref_rejected_logps = policy_chosen_logps.new_tensor([p.ref_rejected_logp for p in pairs])
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, cfg.beta,
        label_smoothing=cfg.label_smoothing)
    return losses, preference_metrics(chosen_rewards, rejected_rewards,
                                      policy_chosen_logps, policy_rejected_logps)


# ---- The reference's scores ----
@torch.no_grad()
def score(model, rows, cfg):
    """log π(y|x) of any number of rows under a model, without gradient: (len(rows),), nats, float64
    on the CPU. The longest rows come first, so if memory runs out, it usually does so early."""
    order = sorted(range(len(rows)), key=lambda i: data.length(rows[i]), reverse=True)
    batches, start = [], 0  # a batch is a list of row numbers
    while start < len(rows):
        size = max(1, MAX_TOKENS // data.length(rows[order[start]]))
        batches.append(order[start:start + size])
        start += size
    logps = torch.zeros(len(rows), dtype=torch.float64)
    for batch in data.progress(batches, f"of {len(batches):,} batches scored"):
        logps[batch] = completion_logps(model, [rows[i] for i in batch], cfg).cpu().double()
    return logps


def score_pairs(reference, pairs, cfg):
    """Add log π_ref(y|x) of both completions to each Pair: [ScoredPair]."""
    chosen_logps, rejected_logps = score(reference, rows_of(pairs), cfg).chunk(2)
    return [ScoredPair(*pair, chosen_logps[i].item(), rejected_logps[i].item())
            for i, pair in enumerate(pairs)]


# ---- Training ----
def make_optimizer(model):
    """AdamW (RMSprop in the paper). Weight decay would pull the weights to 0, not to π_ref."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)


def train_step(model, optimizer, batch, objective, cfg):
    """One step of the optimizer on a batch of examples. Returns the batch's means {name: number}.

    objective  (model, examples, cfg) -> losses (B,), metrics {name: (B,)}
    raises FloatingPointError if the loss or the gradient is not finite; no weight has changed then
    """
    optimizer.zero_grad()
    sums = collections.Counter()
    size = math.ceil(len(batch) / cfg.grad_accum)
    for i in range(0, len(batch), size):  # over micro-batches
        losses, metrics = objective(model, batch[i:i + size], cfg)
        (losses.sum() / len(batch)).backward()  # for one micro-batch: losses.mean().backward()
        for name, values in {"loss": losses.detach(), **metrics}.items():
            sums[name] += values.sum()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # it limits outliers
    means = {name: (total / len(batch)).item() for name, total in sums.items()}
    if not (math.isfinite(means["loss"]) and norm.isfinite()):
        raise FloatingPointError(f"loss {means['loss']}, norm of the gradient {norm}")
    optimizer.step()
    return means


def warmup_cosine(step, steps, peak):
    """Learning rate of step 1, …, steps: up to peak in the first tenth, then a cosine towards 0."""
    warmup = math.ceil(steps / 10)
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2


def train_stage(run, stage, model, examples, objective, steps, peak, held_out_pairs):
    """The loop of SFT and of DPO. Up to ten times, evenly spaced, it evaluates held_out_pairs and
    prints a row. With --resume it skips the steps that the earlier run has done."""
    cfg, optimizer = run.cfg, make_optimizer(model)
    done = run.restore(stage, model, optimizer)
    batches = itertools.islice(data.batches(examples, cfg.batch_size, cfg.seed), done, None)
    tenths = {math.ceil(i * steps / 10) for i in range(1, 11)}
    recent, is_first_row, began = [], True, time.perf_counter()
    for step in range(done + 1, steps + 1):
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, steps, peak)
        try:
            metrics = train_step(model, optimizer, next(batches), objective, cfg)
        except FloatingPointError as error:
            raise FloatingPointError(f"{stage} step {step}: {error}; is the learning rate {peak:g} "
                                     "too high? Start again with another --out") from None
        if step in tenths and held_out_pairs:
            means = evaluate(model, held_out_pairs, cfg)
            metrics |= {f"eval/{name}": mean for name, mean in means.items()}
        run.log(stage=stage, step=step, **metrics)
        recent.append(metrics)
        if step in tenths:
            seconds_left = (time.perf_counter() - began) / (step - done) * (steps - step)
            print_row(stage, step, steps, recent, seconds_left, is_first_row)
            recent, is_first_row = [], False
        if step % cfg.save_every == 0 or step == steps:
            run.save(stage, step, model, optimizer if step < steps else None)
    optimizer.zero_grad()  # frees the gradients, which the reference does not need


@torch.no_grad()
def evaluate(policy, pairs, cfg):
    """Mean DPO loss and metrics of any number of ScoredPairs: {name: number}. Its batches have the
    size of a micro-batch in training but need no gradient, so they should fit in memory too."""
    pairs = sorted(pairs, key=data.length)
    size = math.ceil(cfg.batch_size / cfg.grad_accum)
    sums = collections.Counter()
    for i in range(0, len(pairs), size):
        losses, metrics = dpo_objective(policy, pairs[i:i + size], cfg)
        for name, values in {"loss": losses, **metrics}.items():
            sums[name] += values.sum().item()
    return {name: total / len(pairs) for name, total in sums.items()}


def print_row(stage, step, steps, recent, seconds_left, is_first_row):
    """Print the means of the metrics since the last row, and above the first row their labels."""
    names = [name for name in COLUMNS if name in recent[-1]]
    if is_first_row:
        print(f"\n{'step':>13}", *(f"{COLUMNS[name]:>8}" for name in names), "ETA")
    means = [np.mean([row[name] for row in recent if name in row]) for name in names]
    position = f"{step}/{steps}" if steps < 10**4 else f"{step:,}"
    cells = [f"{mean:8.3f}" if abs(mean) < 1000 else f"{mean:8.1e}" for mean in means]
    eta = f"{seconds_left:.0f}s" if seconds_left < 100 else f"{seconds_left / 60:.0f}m"
    print(f"{stage:4}{position:>9}", *cells, f"{eta:>3}", flush=True)


# ---- The two tasks ----
class ToyTask:
    """The toy task. Its pairs are samples of the SFT model, labelled by a simulated annotator."""

    def __init__(self, cfg):
        if cfg.tokenizer != "toy":
            raise ValueError("the toy task needs the tokenizer toy; give your pairs with --data")
        self.cfg, self.tokenizer = cfg, data.toy_tokenizer()
        self.prompts, self.held_out_prompts = data.toy_prompts()
        self.checksum = 0  # its texts follow from the seed

    def sft_rows(self):
        rng = np.random.default_rng((self.cfg.seed, 1))
        reviews = data.toy_reviews(self.prompts, self.cfg.n_reviews, rng)
        return [data.encode(self.tokenizer, x, y) for x, y in reviews]

    def pairs(self, sft):
        pairs = make_pairs(sft, self.prompts, self.cfg.n_pairs, self.cfg, self.tokenizer)
        print(f"\n{self.cfg.n_pairs:,} pairs sampled, {len(pairs):,} kept (completions differ)")
        if not pairs:
            fail("all sampled pairs are identical answers; more --n_pairs or --sft_steps may help")
        return pairs, make_pairs(sft, self.held_out_prompts, EVALUATED, self.cfg, self.tokenizer)

    def report(self, reference, policy, cfg):
        prompt_ids = [self.tokenizer.encode_ordinary(x) for x in self.held_out_prompts]
        exact = report_exactly(reference, policy, self.held_out_prompts, cfg, self.tokenizer)
        return exact | report_samples(reference, policy, prompt_ids, data.MAX_NEW_TOKENS, cfg,
                                      self.tokenizer)


def make_pairs(sft, prompts, n, cfg, tokenizer):
    """Sample n pairs of completions y ~ π_SFT(·|x), and let a simulated annotator choose: [Pair].
    Pairs of identical completions are left out."""
    prompts = [prompts[i % len(prompts)] for i in range(n)]
    prompt_ids = [tokenizer.encode_ordinary(x) for x in prompts]
    samples = sample(sft, prompt_ids + prompt_ids, data.MAX_NEW_TOKENS, cfg, tokenizer)
    # A sample that was cut before EOS is decoded with "…" at its end, so it counts as malformed.
    rewards = [data.reward(x, data.decode(tokenizer, y))
               for x, y in zip(prompts + prompts, samples, strict=True)]
    rng = np.random.default_rng((cfg.seed, 2))
    first_wins = data.prefers_first(rewards[:n], rewards[n:], rng)
    pairs = [Pair(ids, first, second) if wins else Pair(ids, second, first)
             for ids, first, second, wins
             in zip(prompt_ids, samples[:n], samples[n:], first_wins, strict=True)]
    return [pair for pair in pairs if pair.chosen != pair.rejected]


class FileTask:
    """Your own pairs (--data). SFT trains on their chosen completions."""

    def __init__(self, cfg, model):
        self.cfg, self.tokenizer = cfg, data.get_tokenizer(cfg.tokenizer)
        pairs, counts = data.encode_pairs(data.read_jsonl(cfg.data), self.tokenizer, cfg.block_size,
                                          model.config.block_size if cfg.init else None)
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
        texts = [ids for pair in pairs for ids in pair]
        lengths = np.array([len(ids) for ids in texts])  # where one text ends and the next begins
        self.checksum = zlib.crc32(np.concatenate(texts), zlib.crc32(lengths))
        mean_lengths = np.mean([(len(p.chosen), len(p.rejected)) for p in pairs], axis=0)
        print("mean length: chosen {:.1f}, rejected {:.1f} tokens".format(*mean_lengths))

    def sft_rows(self):
        return [Row(pair.prompt, pair.chosen) for pair in self.training_pairs]

    def pairs(self, sft):
        return self.training_pairs, self.held_out_pairs

    def report(self, reference, policy, cfg):
        half = cfg.block_size // 2  # of a row is for the prompt, the other half for the sample
        pairs = self.held_out_pairs or self.training_pairs
        print(f"\nsamples for {'held-out' if self.held_out_pairs else 'training'} prompts")
        prompt_ids = list(dict.fromkeys(tuple(pair.prompt[-half:]) for pair in pairs))[:32]
        return report_samples(reference, policy, prompt_ids, half, cfg, self.tokenizer)


def print_pairs(pairs, tokenizer):
    for pair in pairs:
        print(f"{tokenizer.decode(pair.prompt)!r:.80}")
        print(f"    chosen   {data.decode(tokenizer, pair.chosen)!r:.67}")
        print(f"    rejected {data.decode(tokenizer, pair.rejected)!r:.67}")


# ---- The report ----
def sample(model, prompt_ids, max_new_tokens, cfg, tokenizer):
    """One completion y ~ π(·|x) per prompt, as ids. The same arguments give the same samples."""
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    n = max(1, MAX_TOKENS // (max(len(ids) for ids in prompt_ids) + max_new_tokens))
    starts = range(0, len(prompt_ids), n)
    samples = []
    for i in data.progress(starts, f"of {len(starts):,} batches sampled"):
        samples += model.sample(prompt_ids[i:i + n], max_new_tokens, 1.0, tokenizer.eot_token,
                                generator)
    return samples


def outcome_logps(model, prompts, cfg, tokenizer):
    """log π of the 1,884 reviews and, last, of all malformed text, for X prompts: (X, 1885), nats.
    The probability of malformed text is 1 - Σ p of the reviews. Below about 1e-6 that is rounding
    noise, because logits are float32, so it is never less than 1e-6 here."""
    completions = [data.encode_completion(tokenizer, y) for y in data.REVIEWS]
    rows = [Row(tokenizer.encode_ordinary(x), y) for x in prompts for y in completions]
    logps = score(model, rows, cfg).view(len(prompts), -1)
    malformed = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([logps, malformed], dim=-1)


def report_exactly(reference, policy, prompts, cfg, tokenizer):
    """Print and return the exact figures of SFT, DPO and the optimum (Eq. 4)."""
    rewards = data.outcome_rewards(prompts)
    logps = {"sft": outcome_logps(reference, prompts, cfg, tokenizer),
             "dpo": outcome_logps(policy, prompts, cfg, tokenizer)}
    logps["optimum"] = optimal_logps(logps["sft"], rewards, cfg.beta)
    table = {name: data.exact_figures(policy_logps, logps["sft"], rewards, cfg.beta)
             for name, policy_logps in logps.items()}
    achieved = table["dpo"]["objective"] - table["sft"]["objective"]  # J(π) - J(π_ref)
    achievable = table["optimum"]["objective"] - table["sft"]["objective"]
    implicit_rewards = cfg.beta * (logps["dpo"] - logps["sft"])
    correlations = [torch.corrcoef(torch.stack([x, r]))[0, 1].item()  # without malformed text
                    for x, r in zip(implicit_rewards[:, :-1], rewards[:, :-1])]
    figures = {"objective_share": achieved / achievable if achievable > 0 else math.nan,
               "kl_to_optimum": (achievable - achieved) / cfg.beta,  # J(π*) - J(π) = β KL(π‖π*)
               "implicit_reward_correlation": np.mean(correlations).item()}
    print(f"\n{f'{len(prompts)} held-out prompts, exact':28}", *(f"{x.upper():>9}" for x in table))
    for key, label in data.FIGURES.items():
        print(f"{label:28}", *(f"{column[key]:9.4f}" for column in table.values()))
    print("DPO achieves {objective_share:.1%} of the achievable improvement of the objective.\n"
          "KL(π‖π*) is {kl_to_optimum:.4f} nats. Over the reviews of a prompt, implicit and true\n"
          "reward have a mean correlation of {implicit_reward_correlation:.4f}.".format(**figures))
    return figures | {f"{x}/{key}": table[x][key] for x in table for key in data.FIGURES}


def report_samples(reference, policy, prompt_ids, max_new_tokens, cfg, tokenizer):
    """Print samples of SFT and DPO. Return an estimate of DPO's KL(π‖π_ref), the mean of
    log π(y|x) - log π_ref(y|x) over one y ~ π per prompt, and its standard error. Samples are cut
    at max_new_tokens, so if texts are longer, this estimates a lower bound of the KL."""
    samples = {"SFT": sample(reference, prompt_ids, max_new_tokens, cfg, tokenizer),
               "DPO": sample(policy, prompt_ids, max_new_tokens, cfg, tokenizer)}
    for i, ids in enumerate(prompt_ids[:4]):
        print(f"\n{tokenizer.decode(ids)!r:.80}")
        for name, completions in samples.items():
            print(f"    {name} {data.decode(tokenizer, completions[i])!r:.71}")
    print(f"\n{len(prompt_ids)} samples: tokens on average, and fraction that end with EOS")
    for name, completions in samples.items():
        ended = np.mean([y[-1] == tokenizer.eot_token for y in completions])
        print(f"    {name}{np.mean([len(y) for y in completions]):8.1f}{ended:8.2f}")
    rows = [Row(x, y) for x, y in zip(prompt_ids, samples["DPO"])]
    log_ratios = score(policy, rows, cfg) - score(reference, rows, cfg)
    kl, error = log_ratios.mean().item(), math.nan  # one sample has no standard error
    if len(rows) > 1:
        error = log_ratios.std().item() / math.sqrt(len(rows))
        print(f"KL(π‖π_ref) from the samples of DPO: {kl:.3f} ± {error:.3f} nats")
    return {"sampled_kl": kl, "sampled_kl_error": error}


# ---- The files of a run ----
class Run:
    """The folder --out of a run, with its metrics and the state from which --resume continues. No
    random state is saved: on the same machine and torch version, the seed repeats every draw."""

    def __init__(self, cfg, checksum):
        """Open a new folder or, with --resume, an earlier run's. Raises ValueError or OSError."""
        self.cfg, self.out = cfg, Path(cfg.out)
        if not cfg.out:
            raise ValueError("--out: expected a folder, got an empty path")
        if os.path.lexists(cfg.out) and not self.out.is_dir():
            kind = "a file" if self.out.exists() else "a link to nothing"
            raise ValueError(f"--out {cfg.out}: expected a folder, got {kind}")
        may_differ = ("data", "out", "save_every", "resume", "overwrite")
        settings = {name: x for name, x in asdict(cfg).items() if name not in may_differ}
        settings["checksum of the pairs in --data"] = checksum
        if cfg.resume:
            self.state = load_checkpoint(self.out / "state.pt")
            for name, now in settings.items():
                saved = self.state.get("settings", {}).get(name)
                if saved != now:
                    raise ValueError(f"{self.out}/state.pt: {name} was {saved}, now it is {now}")
        else:
            self.clear()
            self.state = {"settings": settings, "metrics_size": 0}
            save_checkpoint(self.out / "state.pt", self.state)
        self.metrics = open(self.out / "metrics.jsonl", "ab")  # at its end
        self.metrics.truncate(min(self.state["metrics_size"], self.metrics.tell()))
        self.metrics.seek(0, 2)  # to the new end, which save records

    def clear(self):
        """Make a folder without files of an earlier run. Only --overwrite deletes them."""
        used = [self.out / name for name in FILES if (self.out / name).exists()]
        if used and not self.cfg.overwrite:
            raise ValueError(f"{self.out} holds an earlier run: continue it with --resume, replace "
                             "it with --overwrite, or choose another folder with --out")
        for given in (self.cfg.data, self.cfg.init):
            if given is not None and any(path.samefile(given) for path in used):
                raise ValueError(f"--overwrite would delete {given}, which this run reads")
        for path in used:  # state.pt first, so that --resume cannot take it for the new run's
            path.unlink()
        self.out.mkdir(parents=True, exist_ok=True)

    def restore(self, stage, model, optimizer):
        """Restore the weights and the optimizer of a stage. Returns the number of steps done. A new
        stage is saved at once, because a resumed run must start from the same weights."""
        if stage not in self.state:
            self.save(stage, 0, model, None)
        done, weights, moments = self.state[stage]
        model.load_state_dict(weights)
        if moments is not None:
            optimizer.load_state_dict(moments)
        return done

    def save(self, stage, done, model, optimizer):
        """Save the state after done steps. At both ends of a stage, pass None as the optimizer."""
        moments = None if optimizer is None else optimizer.state_dict()
        self.state[stage] = done, model.state_dict(), moments
        self.state["metrics_size"] = self.metrics.tell()
        save_checkpoint(self.out / "state.pt", self.state)

    def log(self, **row):
        """Append a line to metrics.jsonl. JSON has no NaN: a number that is not finite is null."""
        row = {key: x if isinstance(x, str) or math.isfinite(x) else None for key, x in row.items()}
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()


# ---- Settings ----
def option(group, default, help, low=None, high=math.inf, choices=None):
    """A field of Config: heading in --help, default, text in --help, range and choices."""
    metadata = {"group": group, "help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """All settings. If a default depends on --data, --init or --device, it is None here."""
    data: str = option("data", None, "JSONL file of your pairs (default: the toy task)")
    held_out: float = option("data", 0.1, "fraction of the prompts of --data to hold out", 0, 0.9)
    tokenizer: str = option("data", None, "for --data, not with --init (default: gpt2)",
                            choices=("toy", "gpt2"))
    block_size: int = option(
        "data", None, "longest row, in tokens (default: 256, with --init the model's)", 16)
    n_pairs: int = option("data", 32768, "pairs to sample in the toy task", 1)
    n_reviews: int = option("data", 20000, "reviews for SFT in the toy task", 1)
    init: str = option("model", None, "checkpoint or GPT-2's pytorch_model.bin to start from")
    n_layer: int = option("model", None, "transformer blocks, not with --init (default: 1)", 1)
    n_head: int = option("model", None, "attention heads, not with --init (default: 4)", 1)
    n_embd: int = option("model", None, "channels, not with --init (default: 64)", 1)
    sft_steps: int = option("SFT", 1000, "steps, one batch each; 0 skips SFT", 0)
    sft_learning_rate: float = option("SFT", None, "peak (default: 4e-3, with --init 1e-5)", 1e-9)
    steps: int = option("DPO", 1000, "steps, one batch each", 1)
    learning_rate: float = option("DPO", None, "peak (default: 1e-3, with --init 1e-6)", 1e-9)
    beta: float = option("DPO", None, "KL penalty β (default: 1.0, with --init 0.1)", 1e-6)
    label_smoothing: float = option("DPO", 0.0, "expected fraction of wrong labels", 0, 0.49)
    batch_size: int = option("run", 64, "completions (SFT) or pairs (DPO) per batch", 1)
    grad_accum: int = option("run", 1, "micro-batches per batch, to save memory", 1)
    device: str = option("run", "cuda" if torch.cuda.is_available() else "cpu",
                         "where to run; mps is not tested", choices=("cpu", "cuda", "mps"))
    dtype: str = option("run", None, "of matrix products (default: bfloat16 if the GPU has it, "
                        "else float32)", choices=("float32", "bfloat16"))
    seed: int = option("run", 0, "of weights, data, samples and batches", 0, 2**32 - 1)
    out: str = option("run", "out", "folder for the results")
    save_every: int = option("run", 100, "steps between two saved states", 1)
    resume: bool = option("run", False, "continue the run in --out")
    overwrite: bool = option("run", False, "delete the earlier run in --out, then start")

    def __post_init__(self):
        """Fill in the defaults and check the ranges. Raises ValueError."""
        defaults = {"sft_learning_rate": 1e-5, "learning_rate": 1e-6, "beta": 0.1}
        if self.init is None:
            defaults = {"sft_learning_rate": 4e-3, "learning_rate": 1e-3, "beta": 1.0,
                        "tokenizer": "toy" if self.data is None else "gpt2",
                        "block_size": 256, "n_layer": 1, "n_head": 4, "n_embd": 64}
        if not getattr(torch, self.device).is_available():
            raise ValueError(f"--device {self.device}: torch does not find it")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite deletes it: choose one")
        native = self.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        defaults["dtype"] = "bfloat16" if native else "float32"
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, defaults.get(f.name))
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if None not in (low, value) and not (low <= value <= high and value < math.inf):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise ValueError(f"--{f.name}: expected a finite number {limits}, got {value}")


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


def make_model(cfg):
    """The model of --init, or a new one, on its device. Seeds torch, and fills in the settings that
    --init determines: its sizes and its tokenizer. Raises ValueError or OSError."""
    torch.manual_seed(cfg.seed)
    torch.set_flush_denormal(True)  # tiny gradients would slow a CPU down
    if cfg.init is None:
        vocab_size = data.get_tokenizer(cfg.tokenizer).n_vocab
        model = GPT(GPTConfig(vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                              cfg.tokenizer))
    else:
        model = GPT.load(cfg.init)
        for name in ("n_layer", "n_head", "n_embd", "tokenizer"):
            if getattr(cfg, name) is not None:
                raise ValueError(f"leave out --{name}, because the model of --init determines it")
            setattr(cfg, name, getattr(model.config, name))
        limit = model.config.block_size
        cfg.block_size = cfg.block_size or limit
        if not 16 <= cfg.block_size <= limit:
            raise ValueError(f"--block_size {cfg.block_size}: expected 16 to {limit}, which is the "
                             "limit of the model of --init")
        has, needs = model.config.vocab_size, data.get_tokenizer(cfg.tokenizer).n_vocab
        if has != needs:
            advice = f"; remove the rows from {needs:,} on" if has > needs else ""
            raise ValueError(f"{cfg.init}: wte.weight has {has:,} rows, but the tokenizer "
                             f"{cfg.tokenizer} has {needs:,} tokens{advice}")
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
    except torch.OutOfMemoryError:
        fail("out of GPU memory: raise --grad_accum or lower --block_size, and start again with "
             "another --out")
    except (OSError, FloatingPointError) as error:
        fail(error)
