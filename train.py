# SPDX-License-Identifier: MIT
"""From a corpus to preferences, as in the DPO paper: SFT -> pairs -> reference -> DPO -> report.

    python train.py                        # the toy world: under a minute on two CPU cores
    python train.py --beta 0.5 --seed 1    # every setting is a flag: python train.py --help
    python train.py --data pairs.jsonl --init pytorch_model.bin    # your own pairs, from GPT-2

Prints progress, then figures on prompts that were never trained on, exact ones in the toy world.
Writes into --out: sft.pt, dpo.pt, metrics.jsonl with every step's metrics, state.pt for --resume.
Read it from main(), at the end.
"""
import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch

import data
from dpo import dpo_loss, optimal_logps, preference_metrics
from model import GPT, GPTConfig, MAX_TOKENS, load_checkpoint, save_checkpoint

ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
PAPER = {"sft_learning_rate": 1e-5, "learning_rate": 1e-6, "beta": 0.1}  # defaults with --init
MAY_BE_0 = "held_out", "sft_steps", "label_smoothing", "seed"  # other numbers are above 0
COLUMNS = "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"


def option(default, help, group=None, choices=None):  # group: a heading in --help, from here on
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass
class Config:
    data: str = option("", "JSONL file of prompt, chosen, rejected; else the toy world", "data")
    held_out: float = option(0.1, "fraction of the prompts of --data to hold out, below 1")
    n_pairs: int = option(32768, "preference pairs to sample in the toy world")
    n_reviews: int = option(20000, "reviews in the SFT corpus of the toy world")
    tokenizer: str = option("auto", "auto: that of --init, else gpt2 with --data, else toy",
                            choices=("auto", "toy", "gpt2"))
    block_size: int = option(256, "longest prompt with its completion, in tokens")
    init: str = option("", "checkpoint to start from, or GPT-2's pytorch_model.bin", "model")
    n_layer: int = option(2, "transformer blocks, without --init")
    n_head: int = option(2, "attention heads in a block, without --init")
    n_embd: int = option(64, "channels, a multiple of n_head, without --init")
    sft_steps: int = option(1000, "steps, one batch each; 0 for none", "SFT")
    sft_learning_rate: float = option(2e-3, "peak learning rate; with --init 1e-5")
    steps: int = option(1000, "steps, one batch each", "DPO")
    learning_rate: float = option(1e-3, "peak learning rate; with --init 1e-6")
    beta: float = option(1.0, "strength of the KL penalty; with --init 0.1")
    label_smoothing: float = option(0.0, "fraction of labels believed flipped, below 0.5")
    batch_size: int = option(64, "texts (SFT) or pairs (DPO) in a batch", "run")
    grad_accum: int = option(1, "parts in which a batch is run, to save memory")
    device: str = option("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of matrix products; auto: float32 on a CPU, 16 bits on a GPU",
                        choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = option(0, "seed of weights, data, samples and batches")
    out: str = option("out", "folder for checkpoints and metrics")
    save_every: int = option(200, "steps between two states to resume from")
    resume: bool = option(False, "continue from the state in --out, if there is one")

    def __post_init__(self):
        """Raise ValueError if a value is impossible; replace auto by what this machine has."""
        for f in fields(self):
            value, may_be_0 = getattr(self, f.name), f.name in MAY_BE_0
            if f.type in (int, float) and not (0 < value < math.inf or value == 0 and may_be_0):
                low = "at least" if may_be_0 else "above"
                raise ValueError(f"expected {f.name} to be {low} 0, got {value}")
        if self.held_out >= 1:
            raise ValueError(f"expected held_out to be below 1, got {self.held_out}")
        dpo_loss(*torch.zeros(4, 1), self.beta, label_smoothing=self.label_smoothing)  # checks both
        gpu = torch.cuda.is_available()
        if self.device == "cuda" and not gpu:
            raise ValueError("expected a GPU for --device cuda, found none")
        half = "bfloat16" if gpu and torch.cuda.is_bf16_supported(False) else "float16"
        self.device = self.device.replace("auto", "cuda" if gpu else "cpu")
        self.dtype = self.dtype.replace("auto", "float32" if self.device == "cpu" else half)


def parse_config(arguments=None):
    """The command line, made from Config's fields."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = fail
    for f in fields(Config):
        text, group, choices = f.metadata.values()
        if group:
            section = parser.add_argument_group(group)
        kind = dict(action="store_true") if f.type is bool else dict(
            type=f.type, choices=choices, metavar="")
        shown = f" (default: {f.default})" if f.type in (int, float) else ""
        section.add_argument(f"--{f.name}", default=f.default, help=text + shown, **kind)
    if parser.parse_args(arguments).init:
        parser.set_defaults(**PAPER)
    return Config(**vars(parser.parse_args(arguments)))


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Run:
    """The folder --out: metrics.jsonl, and state.pt, from which --resume continues bit for bit.

    A state holds the step, the weights and the optimizer of each stage. It holds no random state:
    samples, labels and batches are drawn again from the seed, and come out the same.
    """
    training, signal = False, None  # the signal that asked for an end while a stage was training

    def __init__(self, cfg, model, texts):
        """Open --out for a run of cfg that begins with this model and these texts."""
        names = "metrics.jsonl", "state.pt", "sft.pt", "dpo.pt"
        outputs = metrics, self.path, *_ = [f"{cfg.out}/{name}" for name in names]
        for path in cfg.data, cfg.init:
            if path and os.path.realpath(path) in map(os.path.realpath, outputs):
                raise ValueError(f"{path}: this run would overwrite it; choose another --out")
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        source = [open(os.path.join(os.path.dirname(data.__file__), name), "rb").read()
                  for name in ("dpo.py", "model.py", "data.py", "train.py")]
        elsewhere = "data", "init", "out", "save_every", "resume"
        made_with = {k: v for k, v in asdict(cfg).items() if k not in elsewhere} | {
            "data": hashlib.sha256(repr(texts).encode()).hexdigest(),
            "init": hashlib.sha256(weights.numpy()).hexdigest(),
            "version": hashlib.sha256(b"".join(source)).hexdigest(),
            "torch": str(torch.__version__), "threads": torch.get_num_threads()}
        os.makedirs(cfg.out, exist_ok=True)
        self.cfg, self.file = cfg, open(metrics, "ab")
        try:
            import fcntl  # which Windows lacks
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except ImportError:
            pass
        except BlockingIOError:
            raise ValueError(f"{metrics}: another run is writing to it") from None
        self.state = {"made_with": made_with, "metrics": 0}
        if cfg.resume and os.path.exists(self.path):
            self.load_state(made_with)
        elif self.file.tell() or any(map(os.path.exists, outputs[1:])):
            shutil.copyfile(metrics, f"{metrics}.old")  # the file itself stays open and locked
            for path in filter(os.path.exists, outputs[1:]):
                os.replace(path, f"{path}.old")
            print(f"{cfg.out}: the files of an earlier run are now called ….old")
        self.file.truncate(self.state["metrics"])

    def load_state(self, made_with):
        """ValueError if it is of another run, or not a state at all."""
        self.state = load_checkpoint(self.path)
        saved, written = self.state.get("made_with"), self.state.get("metrics")
        if not isinstance(saved, dict) or type(written) is not int or written < 0:
            raise ValueError(f"{self.path}: not a state of this program")
        for name, value in made_with.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"{self.path}: made with {name} {saved.get(name)}, this run has {value}")
        if written > self.file.tell():
            raise ValueError(f"{self.file.name}: shorter than when {self.path} was written")

    def train(self, stage, model, examples, loss_of, steps, peak, evaluate=dict):
        """Fit what is left of a stage. Ten times print the means of the metrics since the last time
        and those of evaluate(); save every save_every steps, at the end and on a signal."""
        optimizer, done = torch.optim.AdamW(model.parameters(), **ADAMW), 0
        try:
            if stage in self.state:
                done = range(steps + 1).index(self.state[stage]["step"])
                model.load_state_dict(self.state[stage]["model"])
                if done < steps:
                    optimizer.load_state_dict(self.state[stage]["optimizer"])
        except Exception:
            raise ValueError(f"{self.path}: not a state of this program") from None
        if done < steps:
            print("\n         step      loss  accuracy    margin    chosen  rejected   left")
        lengths = [sum(map(len, example)) for example in examples]
        Run.training, began, recent = True, time.perf_counter(), []
        for step, metrics in fit(model, optimizer, lengths, loss_of, steps, peak, self.cfg, done):
            recent.append(metrics)
            due = step % max(1, steps // 10) == 0 or step == steps
            held_out = evaluate() if due else {}
            self.write(stage=stage, step=step, **metrics,
                       **{f"eval/{name}": held_out[name] for name in COLUMNS[:2] if held_out})
            if step % self.cfg.save_every == 0 or step == steps or self.signal:
                with torch.no_grad():
                    if not loss_of(np.arange(len(examples))[:4])["loss"].isfinite().all():
                        raise ValueError(f"step {step}: the loss after it is not finite; is the "
                                         "learning rate too high?")
                self.state |= {"metrics": self.file.tell(), stage: {
                    "step": step, "model": model.state_dict(),
                    "optimizer": optimizer.state_dict() if step < steps else None}}
                save_checkpoint(self.path, self.state)
            if due:
                left = (time.perf_counter() - began) / (step - done) * (steps - step)
                means = {name: np.mean([m[name] for m in recent]) for name in metrics}
                print_row(f"{stage:4}{f'{step}/{steps}':>9}", means, f"{left:6.0f}s")
                if held_out:
                    print_row("     held out", held_out)
                recent = []
            if self.signal:
                print(f"\nstopped after {stage} step {step}; --resume continues from there")
                sys.exit(128 + self.signal)
        Run.training = False
        optimizer.zero_grad()  # frees the gradients; the moments go with the optimizer

    def write(self, **metrics):
        """A line of metrics.jsonl, in which nan is null. Raises OSError on a full disk."""
        metrics = {name: None if value != value else value for name, value in metrics.items()}
        self.file.write((json.dumps(metrics) + "\n").encode())
        self.file.flush()


def print_row(label, metrics, end=""):
    cells = (f"{metrics[name]:10.3f}" if name in metrics else " " * 10 for name in COLUMNS)
    print(label + "".join(cells) + end, flush=True)


def learning_rate(step, steps, peak):
    """For step 1 … steps: up to the peak in the first tenth, then down to 0 along a cosine."""
    warmup = math.ceil(steps / 10)
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1))) / 2


def fit(model, optimizer, lengths, loss_of, steps, peak, cfg, start=0):
    """The training loop, a generator: yields (step, metrics) after each step of the optimizer.

    lengths  tokens of each example, for batches of similar lengths
    loss_of  an array of b example numbers -> {name: (b,)}, of which "loss" carries the gradient
    steps    steps in all, of which start are done; peak is the highest learning rate
    cfg      batch_size, grad_accum, seed, device, dtype
    metrics  means over the batch, floats. ValueError if the loss or its gradient is not finite.
    """
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.dtype == "float16")
    batches = itertools.islice(data.batches(lengths, cfg.batch_size, cfg.seed), start, steps)
    for step, batch in enumerate(batches, start + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        optimizer.zero_grad()
        results = []
        for part in np.array_split(batch, min(cfg.grad_accum, len(batch))):
            result = loss_of(part)
            scaler.scale(result["loss"].sum() / len(batch)).backward()  # in all, the batch's mean
            results.append({name: value.detach() for name, value in result.items()})
        metrics = {name: torch.cat([result[name] for result in results]).mean().item()
                   for name in results[0]}
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (math.isfinite(metrics["loss"]) and (scaler.is_enabled() or norm.isfinite())):
            raise ValueError(f"step {step}: loss {metrics['loss']}, gradient {norm}; is the "
                             f"learning rate too high? Its examples: {sorted(batch.tolist())}")
        scaler.step(optimizer)
        scaler.update()
        yield step, metrics


def logps_of(model, examples, cfg):
    """log π(y|x) of the K completions in each (prompt, completion, …) of a batch: (B, K), nats.

    Matrix products run in cfg.dtype; weights, softmax and sums stay in float32."""
    with torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
        return model.completion_logps(*data.collate(examples, cfg.device))


@torch.no_grad()
def score(model, examples, cfg):
    """log π(y|x) of any number of examples, in order and without gradient: (len(examples), K)."""
    lengths = np.array([sum(map(len, example)) for example in examples])
    order, logps, done = np.argsort(-lengths, kind="stable"), [], 0
    while done < len(order):
        batch = order[done:done + max(1, MAX_TOKENS // lengths[order[done]])]  # the longest first
        logps.append(logps_of(model, [examples[i] for i in batch], cfg))
        done += len(batch)
    return torch.cat(logps)[np.argsort(order)]


def pair_metrics(policy_logps, ref_logps, cfg):
    """The DPO loss and the field's metrics from log π(y|x) of pairs under the policy and under the
    reference, (b, 2) each: the chosen completion, then the rejected. Returns {name: (b,)}."""
    policy_chosen_logps, policy_rejected_logps = policy_logps.unbind(1)
    ref_chosen_logps, ref_rejected_logps = ref_logps.unbind(1)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, cfg.beta,
        label_smoothing=cfg.label_smoothing)
    return preference_metrics(losses, chosen_rewards, rejected_rewards,
                              policy_chosen_logps, policy_rejected_logps)


def means(metrics):
    return {name: value.mean().item() for name, value in metrics.items()}


def sample(model, prompts, max_new_tokens, cfg, tokenizer):
    """A completion y ~ π(·|x) of each prompt, the same ones whenever it is called."""
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    return model.sample(prompts, max_new_tokens, 1.0, tokenizer.eot_token, generator)


def make_pairs(sft, prompts, cfg, tokenizer):
    """Sample y1, y2 ~ π_SFT(·|x) and let the labeller choose: [(prompt, chosen, rejected)] ids."""
    n, texts = cfg.n_pairs, [prompts[i % len(prompts)] for i in range(cfg.n_pairs)]
    ids = [tokenizer.encode_ordinary(x) for x in texts]
    both = sample(sft, ids + ids, data.MAX_NEW_TOKENS, cfg, tokenizer)
    rewards = np.array([data.reward(x, data.decode(tokenizer, y))
                        for x, y in zip(texts + texts, both)])
    wins = data.prefers_first(rewards[:n], rewards[n:], np.random.default_rng((cfg.seed, 2)))
    pairs = [(x, y1, y2) if first_wins else (x, y2, y1)
             for x, y1, y2, first_wins in zip(ids, both[:n], both[n:], wins) if y1 != y2]
    if not pairs:
        raise ValueError("expected pairs of different samples, but each pair's two are identical")
    malformed = np.sum(np.minimum(rewards[:n], rewards[n:]) == data.MALFORMED)
    print(f"\n{n:,} pairs: {n - len(pairs):,} identical dropped, {malformed:,} hold malformed text")
    return pairs


def outcome_logps(model, prompts, cfg, tokenizer):
    """(X, 1885) float64: log π of every review and, last, of all malformed text together."""
    reviews = [data.encode(tokenizer, "", y)[1] for y in data.REVIEWS]
    rows = [(tokenizer.encode_ordinary(x), *reviews[i:i + 12])  # a dozen completions a row
            for x in prompts for i in range(0, len(reviews), 12)]
    logps = score(model, rows, cfg).double().view(len(prompts), -1).cpu()
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
    return torch.cat([logps, rest], dim=-1)


def report_exactly(sft, policy, prompts, cfg, tokenizer):
    """Print the exact figures of SFT, DPO and the optimum of RLHF (Eq. 4). Returns them, the
    prompts in ids and the length of a sample."""
    rewards = data.outcome_rewards(prompts)
    ref_logps, dpo_logps = (outcome_logps(m, prompts, cfg, tokenizer) for m in (sft, policy))
    best_logps = optimal_logps(ref_logps, rewards, cfg.beta)
    rows = {name: data.exact_figures(logps, ref_logps, rewards, cfg.beta)
            for name, logps in (("sft", ref_logps), ("dpo", dpo_logps), ("optimum", best_logps))}
    start, reached, best = (row["objective"] for row in rows.values())
    correlations = [torch.corrcoef(torch.stack([change, r])[:, :-1])[0, 1].item()
                    for change, r in zip(dpo_logps - ref_logps, rewards)]
    summary = {"objective_share": (reached - start) / (best - start) if best > start else math.nan,
               "kl_to_optimum": (dpo_logps.exp() * (dpo_logps - best_logps)).sum(-1).mean().item(),
               "implicit_reward_correlation": np.mean(correlations).item()}
    print(f"\n{len(prompts)} held-out prompts, exact        SFT       DPO   OPTIMUM")
    for figure, label in data.FIGURES.items():
        print(f"{label:28}" + "".join(f"{row[figure]:10.4f}" for row in rows.values()))
    print("DPO has {objective_share:.1%} of what the objective can gain over SFT; KL(π‖π*) is "
          "{kl_to_optimum:.4f} nats.\nIts implicit reward and the true reward correlate at "
          "{implicit_reward_correlation:.4f}.".format(**summary))
    summary |= {f"{name}/{figure}": row[figure] for name, row in rows.items() for figure in row}
    return summary, [tokenizer.encode_ordinary(x) for x in prompts], data.MAX_NEW_TOKENS


def report_on_pairs(sft, policy, pairs, cfg, tokenizer):
    """The same for held-out pairs; KL(π‖π_ref) and its standard error are from one sample to each
    of at most 64 prompts."""
    began, ref_logps = time.perf_counter(), score(sft, pairs, cfg)
    figures = means(pair_metrics(score(policy, pairs, cfg), ref_logps, cfg))
    for name in "chosen", "rejected":
        figures[f"logps/{name}_change"] = figures[f"rewards/{name}"] / cfg.beta
    longest = max(len(y) for _, *completions in pairs for y in completions)
    prompts = dict.fromkeys(tuple(x[longest - cfg.block_size:]) for x, _, _ in pairs)
    prompts = [list(x) for x in prompts][:64]
    samples = list(zip(prompts, sample(policy, prompts, longest, cfg, tokenizer)))
    log_ratios, n = score(policy, samples, cfg) - score(sft, samples, cfg), len(samples)
    figures["kl"] = log_ratios.mean().item()
    figures["kl_error"] = log_ratios.std().item() / n ** 0.5 if n > 1 else math.nan
    print(f"\n{len(pairs)} held-out pairs (before DPO: loss 0.693, accuracies 0.5, margins 0)")
    for name, value in figures.items():
        print(f"    {name:22}{value:9.3f}")
    print(f"    {'seconds for these':22}{time.perf_counter() - began:9.1f}")
    return figures, prompts, longest


def show_samples(sft, policy, prompts, max_new_tokens, cfg, tokenizer):
    """Print two completions each of SFT and DPO to three prompts."""
    prompts = prompts[:3]
    drawn = {name: sample(model, prompts * 2, max_new_tokens, cfg, tokenizer)
             for name, model in (("SFT", sft), ("DPO", policy))}
    for i, prompt in enumerate(prompts):
        print(f"\n{tokenizer.decode(prompt)!r:.80}")
        for name, completions in drawn.items():
            for y in completions[i::len(prompts)]:
                print(f"    {name} {data.decode(tokenizer, y)!r:.71}")


def first_model(cfg):
    """The model to begin with and its tokenizer. ValueError where --init and the flags disagree."""
    model = GPT.load(cfg.init) if cfg.init else None
    own = model.config.tokenizer if model else "gpt2" if cfg.data else "toy"
    name = own if cfg.tokenizer == "auto" else cfg.tokenizer
    if not cfg.data and name != "toy":
        raise ValueError(f"expected --data with the tokenizer {name}; the toy world has its own")
    tokenizer = data.get_tokenizer(name)
    if model is None:
        sizes = cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd
        return GPT(GPTConfig(tokenizer.n_vocab, *sizes, name)), tokenizer
    if (own, model.config.vocab_size) != (name, tokenizer.n_vocab):
        raise ValueError(f"{cfg.init}: made for the {model.config.vocab_size} tokens of {own}, "
                         f"expected the {tokenizer.n_vocab} of {name}")
    if cfg.block_size > model.config.block_size:
        raise ValueError(f"{cfg.init}: expected block_size to be at most "
                         f"{model.config.block_size}, got {cfg.block_size}")
    return model, tokenizer


def toy_world(cfg, texts, tokenizer):
    """What a run needs: corpus, held-out prompts, pairs as a function of the SFT model, report."""
    prompts, held_out = texts
    reviews = data.corpus(prompts, cfg.n_reviews, np.random.default_rng((cfg.seed, 0)))
    corpus = [data.encode(tokenizer, x, y) for x, y in reviews]
    return corpus, held_out, lambda sft: make_pairs(sft, prompts, cfg, tokenizer), report_exactly


def own_pairs(cfg, texts, tokenizer):
    """The same from a file of pairs: the corpus is what was preferred, pairs are held out."""
    pairs, held_out, counts = data.split_pairs(
        texts, tokenizer, cfg.block_size, cfg.held_out, cfg.seed)
    print("pairs:", *(f"{n:10,} {name}" for name, n in counts.items()), sep="\n")
    return [(x, chosen) for x, chosen, _ in pairs], held_out, lambda sft: pairs, report_on_pairs


def main(arguments=None):
    cfg = parse_config(arguments)
    torch.manual_seed(cfg.seed)
    texts = data.read_jsonl(cfg.data) if cfg.data else data.prompts()
    sft, tokenizer = first_model(cfg)
    world = own_pairs if cfg.data else toy_world
    corpus, held_out, pairs_of, report = world(cfg, texts, tokenizer)
    if sum(p.numel() for p in sft.parameters()) < 2**20:
        torch.set_num_threads(1)  # several would wait for each other more than they compute
    run = Run(cfg, sft, texts)
    sft.to(cfg.device)

    # 1. Supervised fine-tuning: maximum likelihood on what people write, or on what they preferred.
    tokens = np.mean([len(y) for _, y in corpus])  # a constant: it does not change the maximum

    def sft_loss(batch):  # in nats per token
        return {"loss": -logps_of(sft, [corpus[i] for i in batch], cfg)[:, 0] / tokens}

    run.train("SFT", sft, corpus, sft_loss, cfg.sft_steps, cfg.sft_learning_rate)
    sft.save(f"{cfg.out}/sft.pt")

    # 2. Preferences: two samples of that model to a prompt; a simulated, noisy human picks one.
    pairs = pairs_of(sft)

    # 3. The reference is the SFT model. Its log-probabilities are constants: once is enough.
    reference = sft.requires_grad_(False)
    ref_logps = score(reference, pairs, cfg)

    # 4. DPO, on a copy.
    policy = copy.deepcopy(reference).requires_grad_(True)

    def dpo_metrics(batch):
        policy_logps = logps_of(policy, [pairs[i] for i in batch], cfg)
        return pair_metrics(policy_logps, ref_logps[batch], cfg)

    few = held_out[::len(held_out) // 32 + 1] if cfg.data else []  # at most 32 held-out pairs
    few_ref_logps = score(reference, few, cfg) if few else None

    def evaluate():
        return means(pair_metrics(score(policy, few, cfg), few_ref_logps, cfg)) if few else {}

    run.train("DPO", policy, pairs, dpo_metrics, cfg.steps, cfg.learning_rate, evaluate)
    policy.save(f"{cfg.out}/dpo.pt")

    # 5. What came out, on held-out prompts: in the toy world, against the truth.
    if held_out:
        cfg = replace(cfg, dtype="float32")
        figures, prompts, longest = report(reference, policy, held_out, cfg, tokenizer)
        run.write(**{f"report/{name}": value for name, value in figures.items()})
        show_samples(reference, policy, prompts, longest, cfg, tokenizer)


def interrupt(number, frame):
    """Ctrl-C and SIGTERM: a training step ends and is saved; anything else ends at once, as it does
    at the second signal."""
    signal.signal(number, signal.SIG_DFL)
    os.write(2, b"\nstopping\n")
    if not Run.training:
        sys.exit(128 + number)
    Run.signal = number


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 loses no report
    try:
        main()
    except BrokenPipeError:  # python train.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(f"{error.filename}: {error.strerror.lower()}" if error.filename else error)
    except (MemoryError, OverflowError, RuntimeError, ValueError) as error:
        fail((str(error) or "out of memory").splitlines()[0])
