# SPDX-License-Identifier: MIT
"""From a corpus to preferences, as in the DPO paper: SFT -> pairs -> reference -> DPO -> report.

    python train.py                        # the toy world: a minute on two CPU cores
    python train.py --beta 0.5 --seed 1    # every setting is a flag: python train.py --help
    python train.py --data pairs.jsonl     # your own pairs, from GPT-2 if you like: see the README

Prints progress, then figures on prompts that were never trained on, exact ones in the toy world.
Writes into --out: sft.pt, dpo.pt, metrics.jsonl with every step's metrics, state.pt for --resume.
"""
import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import pathlib
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch

import data
from dpo import dpo_loss, limit_logps, preference_metrics
from model import GPT, TOKENS_AT_ONCE, GPTConfig, read, save

ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
COLUMNS = "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"

def option(default, help, *allowed):  # the lowest value and what it must stay below; or words
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class Config:
    data: str = option("", "JSONL of prompt, chosen, rejected; without it, the toy world")
    tokenizer: str = option("auto", "toy, or gpt2: auto with --data", "auto", "toy", "gpt2")
    init: str = option("", "start from a checkpoint of ours or GPT-2's pytorch_model.bin")
    held_out: float = option(0.1, "share of the prompts of --data to hold out", 1e-9, 1)
    beta: float = option(1.0, "pull to the reference; larger stays nearer", 1e-9, 2**32)
    label_smoothing: float = option(0.0, "share of labels believed flipped", 0, 0.5)
    learning_rate: float = option(1e-3, "peak rate of DPO; some 1e-6 for GPT-2", 1e-12, 2**32)
    steps: int = option(1000, "DPO steps, one batch each", 1, 2**32)
    pairs: int = option(32768, "preference pairs to sample in the toy world", 1, 2**32)
    sft_learning_rate: float = option(2e-3, "peak rate of SFT; some 1e-5 for GPT-2", 1e-12, 2**32)
    sft_steps: int = option(1000, "SFT steps, one batch each; 0 for none", 0, 2**32)
    reviews: int = option(20000, "reviews in the SFT corpus of the toy world", 1, 2**32)
    batch_size: int = option(64, "texts (SFT) or pairs (DPO) in a batch", 1, 2**32)
    grad_accum: int = option(1, "parts that a batch is run in, to save memory", 1, 2**32)
    block_size: int = option(256, "longest prompt with its answer, in tokens", 16, 2**32)
    n_layer: int = option(2, "transformer blocks of a model without --init", 1, 2**32)
    n_head: int = option(2, "attention heads in a block of it", 1, 2**32)
    n_embd: int = option(64, "channels of it, a multiple of n_head", 1, 2**32)
    device: str = option("auto", "auto: the GPU if there is one", "auto", "cpu", "cuda")
    dtype: str = option("auto", "of matrix products", "auto", "float32", "bfloat16", "float16")
    seed: int = option(0, "of weights, data, sampling and batches", 0, 2**32)
    out: str = option("out", "folder for checkpoints and metrics")
    save_every: int = option(200, "steps between two states to resume from", 1, 2**32)
    resume: bool = option(False, "go on from the state in --out, if there is one")

    def __post_init__(self):
        """Raise ValueError on impossible values; replace auto by what this machine has."""
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if f.type in (int, float) and not allowed[0] <= value < allowed[1]:
                raise ValueError(f"expected {f.name} in [{allowed[0]}, {allowed[1]}), got {value}")
            if f.type is str and allowed and value not in allowed:
                raise ValueError(f"expected {f.name} {', '.join(allowed)}, got {value}")
        gpu = torch.cuda.is_available()
        if self.device == "cuda" and not gpu or self.tokenizer == "gpt2" and not self.data:
            raise ValueError("--device cuda needs a GPU, and --tokenizer gpt2 needs --data")
        self.tokenizer = self.tokenizer.replace("auto", "gpt2" if self.data else "toy")
        self.device = self.device.replace("auto", "cuda" if gpu else "cpu")
        half = "bfloat16" if gpu and torch.cuda.is_bf16_supported(False) else "float16"
        self.dtype = self.dtype.replace("auto", "float32" if self.device == "cpu" else half)


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_config(arguments=None):
    """The command line, made from Config's fields."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": ""}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **kind)
    return Config(**vars(parser.parse_args(arguments)))


class Log:
    """The folder --out: metrics.jsonl, and state.pt, from which --resume goes on bit for bit.

    A state is weights, optimizer, scaler, steps of each stage and the length of metrics.jsonl, but
    no random state: what is random is drawn from generators made of the seed when its stage begins,
    so that samples, labels and batches come out the same again."""
    signal = None  # the number of the signal that asked for an end, if one did

    def __init__(self, cfg):
        os.makedirs(cfg.out, exist_ok=True)
        self.path, self.every = f"{cfg.out}/state.pt", cfg.save_every
        run = {k: v for k, v in asdict(cfg).items() if k not in ("out", "save_every", "resume")}
        run |= {name: hashlib.sha256(pathlib.Path(run[name]).read_bytes()).hexdigest()
                for name in ("data", "init") if run[name]}  # a file is known by its content
        run["version"] = f"1 on torch {torch.__version__}"
        self.state = {"run": run, "metrics": 0}
        if cfg.resume and os.path.exists(self.path):
            self.state = read(self.path)
            for name, value in run.items():
                saved = self.state.get("run", {}).get(name)
                if saved != value:
                    raise ValueError(f"{self.path}: made with {name} {saved}, this run has {value}")
        elif os.path.exists(self.path):
            os.remove(self.path)
        self.file = open(f"{cfg.out}/metrics.jsonl", "ab", buffering=0)
        if self.file.tell() < self.state["metrics"]:
            raise ValueError(f"{self.file.name}: shorter than when {self.path} was written")
        self.file.truncate(self.state["metrics"])

    def start(self, stage, steps, **parts):
        """Begin a stage, or put its parts where the state left them; returns the steps done."""
        saved = self.state.get(stage, {"step": 0})
        for name in parts.keys() & saved.keys():
            parts[name].load_state_dict(saved[name])
        self.stage, self.steps, self.parts, self.done = stage, steps, parts, saved["step"]
        self.tokens, self.began = 0, time.perf_counter()
        if saved["step"] < steps:
            print("\n         step      loss  accuracy    margin    chosen  rejected tokens/s left")
        return self.done

    def write(self, **metrics):
        self.file.write((json.dumps(metrics) + "\n").encode())

    def step(self, step, metrics, tokens):
        """A finished step: written, shown ten times a stage, the state saved when it is due."""
        self.write(stage=self.stage, step=step, **metrics)
        self.tokens += int(tokens)
        if step % max(1, self.steps // 10) == 0 or step == self.steps:
            seconds = time.perf_counter() - self.began
            left = round(seconds / (step - self.done) * (self.steps - step))
            print(f"{self.stage:4}{f'{step}/{self.steps}':>9}",
                  *(f"{metrics[name]:9.3f}" if name in metrics else " " * 9 for name in COLUMNS),
                  f"{self.tokens / seconds:8.0f}{left // 60:2}:{left % 60:02}", flush=True)
        if step % self.every == 0 or step == self.steps or self.signal:
            os.fsync(self.file.fileno())
            parts = {name: part.state_dict() for name, part in self.parts.items()
                     if name == "model" or step < self.steps}  # of a finished stage the weights
            self.state |= {"metrics": self.file.tell(), self.stage: {"step": step, **parts}}
            save(self.path, self.state)
        if self.signal:
            print(f"\nstopped after {self.stage} step {step}; --resume goes on from there")
            sys.exit(128 + self.signal)


def learning_rate(step, steps, peak):
    """The smaller of a warm-up over the first tenth of the steps and a cosine from peak to 0."""
    return peak * min((step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def logps_of(model, examples, cfg):
    """log π(y|x) of the K answers in each (prompt, answer, …) of a batch of ids: (B, K), nats.

    Matrix products run in cfg.dtype; weights, softmax and sums stay in float32."""
    with torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
        return model.answer_logps(*data.collate(examples, cfg.device))


@torch.no_grad()
def score(model, examples, cfg):
    """log π(y|x) of any number of examples, in order and without gradient: (len(examples), K)."""
    n = max(1, TOKENS_AT_ONCE // max(sum(map(len, example)) for example in examples))
    return torch.cat([logps_of(model, examples[i:i + n], cfg) for i in range(0, len(examples), n)])


def fit(model, examples, cfg, log, ref_logps=None):
    """The training loop of both stages, which differ in nothing but the loss of an example:

    SFT  (prompt, answer), -log π(y|x): maximum likelihood; the prompt is not scored
    DPO  (prompt, chosen, rejected), Eq. 7; ref_logps (n, 2) holds the reference's of both answers
    """
    stage, steps, peak = (("SFT", cfg.sft_steps, cfg.sft_learning_rate) if ref_logps is None else
                          ("DPO", cfg.steps, cfg.learning_rate))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.dtype == "float16")
    done = log.start(stage, steps, model=model, optimizer=optimizer, scaler=scaler)
    lengths = np.array([sum(map(len, example)) for example in examples])
    batches = itertools.islice(data.batches(lengths, cfg.batch_size, cfg.seed), done, steps)
    for step, batch in enumerate(batches, done + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step - 1, steps, peak)
        optimizer.zero_grad()
        results = []
        for part in np.array_split(batch, min(cfg.grad_accum, len(batch))):
            logps = logps_of(model, [examples[i] for i in part], cfg)  # (b, K)
            if stage == "SFT":
                result = (-logps.squeeze(1),)
            else:
                result = *dpo_loss(*logps.T, *ref_logps[part].T, cfg.beta,
                                   label_smoothing=cfg.label_smoothing), *logps.T
            scaler.scale(result[0].sum() / len(batch)).backward()  # together: the batch's mean
            results.append([value.detach() for value in result])
        losses, *rest = (torch.cat(values) for values in zip(*results))
        metrics = preference_metrics(losses, *rest) if rest else {"loss": losses.mean().item()}
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (math.isfinite(metrics["loss"]) and (scaler.is_enabled() or norm.isfinite())):
            raise ValueError(f"{stage} step {step}: loss {metrics['loss']}, gradient {norm}; is "
                             f"the learning rate too high? Its examples: {sorted(batch.tolist())}")
        scaler.step(optimizer)
        scaler.update()
        log.step(step, metrics, lengths[batch].sum())


def sample(model, prompts, max_new_tokens, cfg, tokenizer):
    """A completion y ~ π(·|x) of each prompt, the same ones whenever it is called."""
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    return model.sample(prompts, max_new_tokens, 1.0, tokenizer.eot_token, generator)


def make_pairs(model, prompts, cfg, tokenizer):
    """Sample y1, y2 ~ π_SFT(·|x) and let the labeller choose: [(prompt, chosen, rejected)] ids."""
    texts = [prompts[i % len(prompts)] for i in range(cfg.pairs)]
    ids = [tokenizer.encode_ordinary(text) for text in texts]
    answers = sample(model, ids + ids, data.MAX_NEW_TOKENS, cfg, tokenizer)
    rewards = np.array([data.reward(x, data.decode(tokenizer, y))
                        for x, y in zip(texts + texts, answers)]).reshape(2, -1)
    first_wins = data.prefers_first(*rewards, np.random.default_rng((cfg.seed, 2)))
    pairs = [(x, y1, y2) if wins else (x, y2, y1) for x, y1, y2, wins in
             zip(ids, answers, answers[cfg.pairs:], first_wins) if y1 != y2]
    print(f"\n{cfg.pairs:,} pairs: {cfg.pairs - len(pairs)} identical dropped, "
          f"{(rewards == data.MALFORMED).any(0).sum()} hold malformed text")
    return pairs


def outcome_logps(model, prompts, cfg, tokenizer):
    """(X, 1885) float64: log π of every review and, last, of the rest: data.outcome_rewards."""
    rows = [data.encode(tokenizer, x, y) for x in prompts for y in data.REVIEWS]
    logps = score(model, rows, cfg).double().view(len(prompts), -1).cpu()
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
    return torch.cat([logps, rest], dim=-1)


def report_exactly(sft, policy, prompts, cfg, tokenizer):
    """Print and return the exact figures of SFT, DPO and the limit at DPO's KL."""
    rewards, figures = data.outcome_rewards(prompts), {}
    ref_logps, dpo_logps = (outcome_logps(m, prompts, cfg, tokenizer) for m in (sft, policy))
    kl = data.exact_figures(dpo_logps, ref_logps, rewards)["kl"]
    print(f"\n{len(prompts)} held-out prompts, exact: {len(data.REVIEWS):,} reviews and the rest\n"
          "           E[r]   KL, nats   well-formed   wins against SFT   labels predicted")
    for name, logps in {"sft": ref_logps, "dpo": dpo_logps,
                        "limit": limit_logps(ref_logps, rewards, kl)}.items():
        row = data.exact_figures(logps, ref_logps, rewards)
        row["accuracy"] = data.exact_accuracy(logps - ref_logps, ref_logps, rewards)
        print("{:6}{:9.3f}{:11.3f}{:14.4f}{:19.3f}{:19.3f}".format(name.upper(), *row.values()))
        figures |= {f"report/{name}/{figure}": value for figure, value in row.items()}
    before, dpo, limit = (figures[f"report/{name}/reward"] for name in ("sft", "dpo", "limit"))
    correlation = np.mean([np.corrcoef((dpo - ref)[:-1], r[:-1])[0, 1]
                           for dpo, ref, r in zip(dpo_logps, ref_logps, rewards)])
    gain = (dpo - before) / (limit - before)
    print(f"LIMIT is the most possible at DPO's KL; DPO has {gain:.1%} of its gain over SFT.\n"
          f"Implicit and true reward correlate at {correlation:.3f}.")
    ids = [tokenizer.encode_ordinary(prompt) for prompt in prompts]
    show_samples(sft, policy, ids, data.MAX_NEW_TOKENS, cfg, tokenizer)
    return figures | {"report/implicit_reward_correlation": float(correlation)}


def report_on_pairs(sft, policy, pairs, cfg, tokenizer):
    """Print and return figures on held-out pairs, and KL(π‖π_ref) from a sample to each prompt (512
    at most) with its standard error; texts are cut at the length of the longest answer."""
    ref_logps, logps = score(sft, pairs, cfg), score(policy, pairs, cfg)  # (n, 2) each
    figures = preference_metrics(*dpo_loss(*logps.T, *ref_logps.T, cfg.beta), *logps.T)
    chosen_change, rejected_change = (logps - ref_logps).mean(0).tolist()
    longest, T = max(len(y) for _, *answers in pairs for y in answers), sft.config.block_size
    prompts = [*map(list, dict.fromkeys(tuple(x[longest - T:]) for x, _, _ in pairs))][:512]
    samples = list(zip(prompts, sample(policy, prompts, longest, cfg, tokenizer)))
    log_ratios = score(policy, samples, cfg) - score(sft, samples, cfg)
    figures |= {"logps/chosen_change": chosen_change, "logps/rejected_change": rejected_change,
                "kl": log_ratios.mean().item(),
                "kl_error": log_ratios.std(correction=0).item() / max(1, len(samples) - 1) ** 0.5}
    print(f"\n{len(pairs)} held-out pairs (before DPO: loss 0.693, accuracies 0.5, margins 0)")
    for name, value in figures.items():
        print(f"    {name:22}{value:9.3f}")
    show_samples(sft, policy, prompts, longest, cfg, tokenizer)
    return {f"report/{name}": value for name, value in figures.items()}


def show_samples(sft, policy, prompts, max_new_tokens, cfg, tokenizer):
    """Print two answers each of SFT and DPO to three prompts."""
    for prompt in prompts[:3]:
        print(f"\n{tokenizer.decode(prompt)!r:.80}")
        for name, model in ("SFT", sft), ("DPO", policy):
            for y in sample(model, [prompt] * 2, max_new_tokens, cfg, tokenizer):
                print(f"    {name} {data.decode(tokenizer, y)!r:.71}")


def main(arguments=None):
    cfg = parse_config(arguments)
    torch.manual_seed(cfg.seed)
    tokenizer = data.get_tokenizer(cfg.tokenizer)
    sft = GPT.load(cfg.init, tokenizer.n_vocab) if cfg.init else GPT(GPTConfig(
        tokenizer.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    if cfg.data:
        pairs, held_out, counts = data.split_pairs(
            data.read_jsonl(cfg.data), tokenizer, min(cfg.block_size, sft.config.block_size),
            cfg.held_out, cfg.seed)
        corpus = [(prompt, chosen) for prompt, chosen, _ in pairs]
        print("pairs:", *(f"{count:10,} {name}" for name, count in counts.items()), sep="\n")
    else:
        prompts, held_out = data.prompts()
        reviews = data.corpus(prompts, cfg.reviews, np.random.default_rng((cfg.seed, 0)))
        corpus = [data.encode(tokenizer, x, y) for x, y in reviews]
    log = Log(cfg)
    sft.to(cfg.device)

    # 1. Supervised fine-tuning: maximum likelihood on what people write, or on what they preferred.
    fit(sft, corpus, cfg, log)
    save(f"{cfg.out}/sft.pt", {"config": asdict(sft.config), "model": sft.state_dict()})

    # 2. Preferences: two samples of that model to a prompt; a simulated, noisy human picks one.
    pairs = pairs if cfg.data else make_pairs(sft, prompts, cfg, tokenizer)

    # 3. The reference is the SFT model. Its log-probabilities are constants: once is enough.
    ref_logps = score(sft, pairs, cfg)

    # 4. DPO, on a copy.
    policy = copy.deepcopy(sft)
    fit(policy, pairs, cfg, log, ref_logps)
    save(f"{cfg.out}/dpo.pt", {"config": asdict(policy.config), "model": policy.state_dict()})

    # 5. What came out, on held-out prompts: in the toy world, against the truth.
    report = report_on_pairs if cfg.data else report_exactly
    log.write(**report(sft, policy, held_out, cfg, tokenizer))


def interrupt(number, frame):
    """Ctrl-C and SIGTERM ask for an end after the step at hand; a second one ends at once."""
    Log.signal = number
    signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (OSError, ValueError) as error:
        fail(error)
