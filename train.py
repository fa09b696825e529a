# SPDX-License-Identifier: MIT
"""From a corpus to preferences, as in the DPO paper: SFT -> pairs -> reference -> DPO -> report.

    python train.py                        # the toy world: a minute on two CPU cores
    python train.py --beta 0.5 --seed 1    # every setting is a flag: python train.py --help

Prints progress, then exact figures on prompts that were never trained on. Writes the checkpoints
sft.pt and dpo.pt and every metric of every step, metrics.jsonl, into the folder --out.

Different from the paper (arXiv 2305.18290, appendix B): AdamW, not RMSprop; a rate of 1e-3 at its
peak, not 1e-6, because the model is small; warm-up over a tenth of the steps, not 150 of them, then
a cosine to 0, not constant; gradients clipped to norm 1; β = 1, not 0.1, because toy rewards are a
few nats. Batches of 64 are the same. Weight decay is 0: it pulls to zero, not to the reference.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch

import data
from dpo import dpo_loss, limit_logps, preference_metrics, sequence_logps
from model import GPT, GPTConfig

ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}

def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    beta: float = option(1.0, "pull to the reference, in reward per nat; larger stays nearer")
    label_smoothing: float = option(0.0, "share of labels believed flipped, in [0, 0.5)")
    learning_rate: float = option(1e-3, "peak learning rate of DPO")
    steps: int = option(1000, "DPO steps, one batch each")
    pairs: int = option(32768, "preference pairs to sample and label")
    sft_learning_rate: float = option(2e-3, "peak learning rate of SFT")
    sft_steps: int = option(1000, "SFT steps, one batch each")
    reviews: int = option(20000, "reviews in the SFT corpus")
    batch_size: int = option(64, "reviews (SFT) or pairs (DPO) in a batch")
    n_layer: int = option(2, "transformer blocks")
    n_head: int = option(2, "attention heads in a block")
    n_embd: int = option(64, "channels, a multiple of n_head")
    device: str = option("auto", "cpu, cuda, or auto: the GPU if there is one")
    dtype: str = option("auto", "autocast: float32, bfloat16, float16, or auto: the device's best")
    seed: int = option(0, "of weights, data, sampling and batches")
    out: str = option("out", "folder for checkpoints and metrics")

    def __post_init__(self):
        """Raise ValueError on impossible values; replace auto by what this machine has."""
        dpo_loss(*torch.zeros(4), self.beta, label_smoothing=self.label_smoothing)  # checks both
        for f in fields(self):
            low, value = {int: int(f.name != "seed"), float: 1e-9}.get(f.type), getattr(self, f.name)
            if low is not None and f.name != "label_smoothing" and not low <= value < 2**32:
                raise ValueError(f"expected {f.name} in [{low}, 2**32), got {value}")
        GPTConfig(vocab_size=1, n_head=self.n_head, n_embd=self.n_embd)  # checks that they fit
        gpu = torch.cuda.is_available()
        if self.device == "auto":
            self.device = "cuda" if gpu else "cpu"
        if self.dtype == "auto":
            native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = "float32" if self.device == "cpu" else "bfloat16" if native else "float16"
        if self.device not in ("cpu", "cuda")[:1 + gpu]:
            raise ValueError(f"expected device cpu, or cuda where there is one, got {self.device}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"expected dtype float32, bfloat16 or float16, got {self.dtype}")


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_config(arguments=None):
    """The command line, made from Config's fields; one line and exit code 2 if it is wrong."""
    parser = argparse.ArgumentParser(description="Train a small GPT: SFT, then DPO.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default, metavar="",
                            help=f.metadata["help"])
    try:
        return Config(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        fail(error)


class Log:
    """A table of progress on the terminal, and every metric in metrics.jsonl, one object a line."""

    def __init__(self, folder):
        self.file = open(f"{folder}/metrics.jsonl", "w")

    def start(self, stage, steps):
        self.stage, self.steps, self.tokens, self.began = stage, steps, 0, time.perf_counter()
        print("\n          step    loss accuracies  margins  logps/chosen rejected tokens/s  left")

    def write(self, **metrics):
        print(json.dumps(metrics), file=self.file, flush=True)

    def step(self, step, metrics, tokens):
        """One finished step: shown in place on a terminal, else ten times a stage."""
        self.write(stage=self.stage, step=step, **metrics)
        self.tokens += int(tokens)
        seconds = time.perf_counter() - self.began
        left = round(seconds / step * (self.steps - step))
        line = "{:4}{:>10}".format(self.stage, f"{step}/{self.steps}")
        for name, width in (("loss", 8), ("rewards/accuracies", 11), ("rewards/margins", 9),
                            ("logps/chosen", 14), ("logps/rejected", 9)):
            line += f"{metrics[name]:{width}.3f}" if name in metrics else " " * width
        line += f"{self.tokens / seconds:9.0f}{left // 60:3}:{left % 60:02}"
        if sys.stdout.isatty():
            print("\r" + line, end="\n" if step == self.steps else "", flush=True)
        elif step % max(1, self.steps // 10) == 0 or step == self.steps:
            print(line, flush=True)


def save(path, model):
    """Write a checkpoint, whole or not at all."""
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, path + ".tmp")
    os.replace(path + ".tmp", path)


def learning_rate(step, steps, peak):
    """The smaller of a warm-up over the first tenth of the steps and a cosine from peak to 0."""
    return peak * min((step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def autocast(cfg):
    """Matrix products run in cfg.dtype; weights, softmax and sums stay in float32."""
    return torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32")


def logps_of(model, rows, cfg):
    """log π(y|x) of a batch of (prompt ids, completion ids): (B,), nats, float32."""
    tokens, mask = data.collate(rows, cfg.device)
    with autocast(cfg):
        return sequence_logps(model(tokens), tokens, mask)


@torch.no_grad()
def score(model, rows, cfg, batch_size=512):
    """log π(y|x) of any number of rows, in their order and without gradient: (len(rows),)."""
    return torch.cat([logps_of(model, rows[i:i + batch_size], cfg)
                      for i in range(0, len(rows), batch_size)])


def train_sft(model, rows, cfg, log):
    """Maximum likelihood: minimise the mean of -log π(y|x) over the corpus; x is not scored."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.dtype == "float16")
    lengths = np.array([len(x) + len(y) for x, y in rows])
    log.start("SFT", cfg.sft_steps)
    for step, batch in zip(range(cfg.sft_steps), data.batches(lengths, cfg.batch_size, cfg.seed)):
        loss = -logps_of(model, [rows[i] for i in batch], cfg).mean()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.sft_steps, cfg.sft_learning_rate)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        log.step(step + 1, {"loss": loss.item()}, lengths[batch].sum())


def make_pairs(model, prompts, cfg, tokenizer, log):
    """Sample y1, y2 ~ π_SFT(·|x) and let the labeller choose: [(prompt, chosen, rejected)] ids."""
    texts = [prompts[i % len(prompts)] for i in range(cfg.pairs)]
    ids = [tokenizer.encode_ordinary(text) for text in texts]
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    options = data.MAX_NEW_TOKENS, 1.0, tokenizer.eot_token, generator
    with autocast(cfg):
        first, second = model.sample(ids, *options), model.sample(ids, *options)
    rewards = np.array([[data.reward(x, data.decode(tokenizer, y)) for x, y in zip(texts, answers)]
                        for answers in (first, second)])
    first_wins = data.prefers_first(*rewards, np.random.default_rng((cfg.seed, 2)))
    pairs = [(x, y1, y2) if wins else (x, y2, y1)
             for x, y1, y2, wins in zip(ids, first, second, first_wins) if y1 != y2]
    identical, malformed = cfg.pairs - len(pairs), int((rewards == data.MALFORMED).any(0).sum())
    log.write(stage="pairs", pairs=len(pairs), identical=identical, malformed=malformed)
    print(f"\n{cfg.pairs:,} pairs: {identical} identical dropped, {malformed} hold malformed text")
    return pairs


def train_dpo(policy, pairs, ref_chosen_logps, ref_rejected_logps, cfg, log):
    """Minimise the DPO loss over the pairs [(prompt, chosen, rejected)] (Eq. 7)."""
    optimizer = torch.optim.AdamW(policy.parameters(), **ADAMW)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.dtype == "float16")
    lengths = np.array([2 * len(x) + len(y_w) + len(y_l) for x, y_w, y_l in pairs])
    log.start("DPO", cfg.steps)
    for step, batch in zip(range(cfg.steps), data.batches(lengths, cfg.batch_size, cfg.seed)):
        chosen = [(x, y_w) for x, y_w, _ in (pairs[i] for i in batch)]
        rejected = [(x, y_l) for x, _, y_l in (pairs[i] for i in batch)]
        chosen_logps, rejected_logps = logps_of(policy, chosen + rejected, cfg).chunk(2)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen_logps, rejected_logps, ref_chosen_logps[batch], ref_rejected_logps[batch],
            cfg.beta, label_smoothing=cfg.label_smoothing)
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.learning_rate)
        optimizer.zero_grad()
        scaler.scale(losses.mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        log.step(step + 1, preference_metrics(losses, chosen_rewards, rejected_rewards,
                                              chosen_logps, rejected_logps), lengths[batch].sum())


def outcome_logps(model, prompts, cfg, tokenizer):
    """(X, 1885) float64: log π of every review and, last, of the rest: data.outcome_rewards."""
    rows = [data.encode(tokenizer, x, y) for x in prompts for y in data.REVIEWS]
    logps = score(model, rows, cfg).double().view(len(prompts), -1).cpu()
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
    return torch.cat([logps, rest], dim=-1)


def evaluate(sft, policy, prompts, cfg, tokenizer):
    """Exact figures of SFT, DPO and the limit at DPO's KL, under their names in metrics.jsonl."""
    rewards = data.outcome_rewards(prompts)
    ref_logps, dpo_logps = (outcome_logps(m, prompts, cfg, tokenizer) for m in (sft, policy))
    kl = data.exact_figures(dpo_logps, ref_logps, rewards)["kl"]
    policies = {"sft": ref_logps, "dpo": dpo_logps, "limit": limit_logps(ref_logps, rewards, kl)}
    figures = {f"report/{who}/{name}": value for who, logps in policies.items()
               for name, value in data.exact_figures(logps, ref_logps, rewards).items()}
    implicit = cfg.beta * (dpo_logps - ref_logps)
    figures["report/implicit_reward_correlation"] = float(np.mean(
        [np.corrcoef(i[:-1], r[:-1])[0, 1] for i, r in zip(implicit, rewards)]))
    figures["report/accuracy"] = data.exact_accuracy(implicit, ref_logps, rewards)
    figures["report/bayes_accuracy"] = data.exact_accuracy(rewards, ref_logps, rewards)
    return figures


def report(figures, sft, policy, prompts, cfg, tokenizer):
    """Print the figures, then samples for three prompts before and after."""
    print(f"\n{len(prompts)} held-out prompts, exact: {len(data.REVIEWS):,} reviews and the rest\n"
          "                           E[r]   KL, nats   well-formed   wins against SFT")
    for name, who in ("SFT", "sft"), ("DPO", "dpo"), ("best policy at that KL", "limit"):
        print("{:22}{:9.3f}{:11.3f}{:14.4f}{:19.3f}".format(
            name, *(figures[f"report/{who}/{x}"] for x in ("reward", "kl", "valid", "win_rate"))))
    before, dpo, limit = (figures[f"report/{who}/reward"] for who in ("sft", "dpo", "limit"))
    correlation, accuracy, bayes = list(figures.values())[-3:]
    print(f"\nDPO gains {(dpo - before) / (limit - before):.1%} of the possible. Implicit and true "
          f"reward correlate at {correlation:.3f}.\nNoisy labels predicted: {accuracy:.1%}; at most "
          f"{bayes:.1%}, by the true reward.")
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    options = data.MAX_NEW_TOKENS, 1.0, tokenizer.eot_token, generator
    for prompt in prompts[::7]:
        four = [tokenizer.encode_ordinary(prompt)] * 4
        print(f"\n{prompt}\n    {'SFT':40}DPO")
        for y_sft, y_dpo in zip(sft.sample(four, *options), policy.sample(four, *options)):
            print(f"    {data.decode(tokenizer, y_sft)!r:40}{data.decode(tokenizer, y_dpo)!r}")


def main(arguments=None):
    cfg = parse_config(arguments)
    os.makedirs(cfg.out, exist_ok=True)
    log = Log(cfg.out)
    torch.manual_seed(cfg.seed)
    tokenizer = data.toy_tokenizer()
    train_prompts, held_out_prompts = data.prompts()

    # 1. Supervised fine-tuning, from scratch: maximum likelihood on what people write.
    corpus = data.corpus(train_prompts, cfg.reviews, np.random.default_rng((cfg.seed, 0)))
    config = GPTConfig(tokenizer.n_vocab, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd)
    sft = GPT(config).to(cfg.device)
    train_sft(sft, [data.encode(tokenizer, x, y) for x, y in corpus], cfg, log)
    save(f"{cfg.out}/sft.pt", sft)

    # 2. Preferences: two samples of that model to a prompt; a simulated, noisy human picks one.
    pairs = make_pairs(sft, train_prompts, cfg, tokenizer, log)

    # 3. The reference is the SFT model, frozen. Its log-probabilities are constants of the data, so
    #    they are computed once, here, and not in every step.
    ref_chosen_logps = score(sft, [(x, y_w) for x, y_w, _ in pairs], cfg)
    ref_rejected_logps = score(sft, [(x, y_l) for x, _, y_l in pairs], cfg)

    # 4. DPO, on a copy.
    policy = copy.deepcopy(sft)
    train_dpo(policy, pairs, ref_chosen_logps, ref_rejected_logps, cfg, log)
    save(f"{cfg.out}/dpo.pt", policy)

    # 5. What came out, against the truth.
    figures = evaluate(sft, policy, held_out_prompts, cfg, tokenizer)
    report(figures, sft, policy, held_out_prompts, cfg, tokenizer)
    log.write(**figures)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'writing'}: {error.strerror}")
