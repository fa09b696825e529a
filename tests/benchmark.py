"""Time and memory of a DPO step, compared with a textbook step in the same run: python -m tests.benchmark

    textbook   random batches; logits at every position; the reference scores each batch again in every step;
               AdamW with its defaults
    ours       what train.py does, and a third of the one pass that scores the reference, for three epochs. (In a
               single epoch, scoring once saves nothing. train.py makes two by default.)

    --only S,M,G        workloads; G, GPT-2 124M in bfloat16, needs a GPU
    --rounds 5          rounds of one epoch each, textbook and ours in turn; the median counts
"""
import argparse
import copy
import functools
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

import data
import train
from dpo import dpo_loss, preference_metrics
from model import GPT, GPTConfig

WORKLOADS = {  # vocabulary, layers, channels, heads, prompt lengths, completion lengths, pairs per batch, batches
    "S": (512, 4, 128, 4, (8, 24), (8, 48), 32, 24),
    "M": (50257, 6, 384, 6, (16, 96), (16, 128), 8, 4),
    "G": (50257, 12, 768, 12, (64, 256), (64, 256), 32, 4),
}
EPOCHS = 3
KINDS = ("textbook", "ours")


def build(name, seed=0):
    """The model, its reference, the pairs and the settings of a workload."""
    V, layers, channels, heads, prompt, completion, batch, batches = WORKLOADS[name]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(V, size=rng.integers(low, high + 1)).tolist()
    pairs = [data.Pair(draw(*prompt), draw(*completion), draw(*completion)) for _ in range(batch * batches)]
    cfg = train.Config(beta=0.1, learning_rate=1e-6, batch_size=batch, steps=batches, seed=seed,
                       dtype="bfloat16" if name == "G" else "float32")
    model = GPT(GPTConfig(V, prompt[1] + completion[1], layers, heads, channels)).to(cfg.device)
    return model, copy.deepcopy(model).requires_grad_(False), pairs, cfg


def textbook_logps(model, rows, cfg):
    """train.completion_logps with logits at every position."""
    tokens, mask = data.collate(rows, cfg.device)
    with torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
        logits = model(tokens)
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum(-1)


def random_batches(pairs, batch_size, seed):
    rng = np.random.default_rng(seed)
    while True:
        for batch in np.array_split(rng.permutation(len(pairs)), len(pairs) // batch_size):
            yield [pairs[i] for i in batch]


def textbook_objective(model, pairs, cfg, reference):
    """train.dpo_objective, but the reference scores the batch too."""
    policy_chosen, policy_rejected = textbook_logps(model, train.rows_of(pairs), cfg).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = textbook_logps(reference, train.rows_of(pairs), cfg).chunk(2)
    losses, *rewards = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, cfg.beta)
    return losses, preference_metrics(*rewards, policy_chosen, policy_rejected)


def epoch(model, optimizer, batches, objective, cfg):
    for step in range(1, cfg.steps + 1):
        optimizer.param_groups[0]["lr"] = train.warmup_cosine(step, cfg.steps, cfg.learning_rate)
        train.train_step(model, optimizer, next(batches), objective, cfg)


def textbook_epoch(model, reference, pairs, cfg):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    objective = functools.partial(textbook_objective, reference=reference)
    epoch(model, optimizer, random_batches(pairs, cfg.batch_size, cfg.seed), objective, cfg)


def our_epoch(model, scored_pairs, cfg):
    batches = data.batches(scored_pairs, cfg.batch_size, cfg.seed)
    epoch(model, train.make_optimizer(model), batches, train.dpo_objective, cfg)


def seconds(call):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run(kind, model, reference, pairs, cfg):
    """Seconds of an epoch."""
    if kind == "textbook":
        return seconds(lambda: textbook_epoch(model, reference, pairs, cfg))
    scored_pairs = []
    scoring = seconds(lambda: scored_pairs.extend(train.score_pairs(reference, pairs, cfg)))
    return scoring / EPOCHS + seconds(lambda: our_epoch(model, scored_pairs, cfg))


def check(model, pairs, cfg):
    """Largest difference of losses, and of gradients relative to the largest one. The reference differs from the model."""
    results, reference = [], copy.deepcopy(model).requires_grad_(False)
    for p in reference.parameters():
        p += 0.02 * torch.randn_like(p)
    scored = train.score_pairs(reference, pairs[:cfg.batch_size], cfg)
    for objective in (functools.partial(textbook_objective, reference=reference), train.dpo_objective):
        losses, _ = objective(model, scored, cfg)
        gradient = torch.autograd.grad(losses.mean(), list(model.parameters()))
        results.append((losses.detach(), torch.cat([g.flatten() for g in gradient])))
    (loss, gradient), (other_loss, other_gradient) = results
    return (loss - other_loss).abs().max().item(), ((gradient - other_gradient).abs().max() / gradient.abs().max()).item()


def memory(name, kind):
    """Peak of a child process that runs an epoch, MiB: resident on the CPU, allocated on a GPU."""
    code = f"from tests import benchmark as b; b.child({name!r}, {kind!r})"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(printed.splitlines()[-1])  # lines of progress may come first


def child(name, kind):
    run(kind, *build(name))
    with open("/proc/self/status") as file:  # not ru_maxrss, which a child inherits from its parent
        resident = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    print(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident / 2**10)


def benchmark(name, rounds):
    model, reference, pairs, cfg = build(name)
    loss_gap, gradient_gap = check(model, pairs, cfg)
    spent = {kind: [] for kind in KINDS}
    for i in range(rounds + 1):  # the first round warms up
        cfg.seed = i
        for kind in KINDS:
            spent[kind].append(run(kind, copy.deepcopy(model), reference, pairs, cfg))
    step = {kind: statistics.median(times[1:]) / cfg.steps for kind, times in spent.items()}
    peak = {kind: memory(name, kind) for kind in KINDS}
    print(f"\n{name}: losses equal to {loss_gap:.1e}, gradients to {gradient_gap:.1e} of the largest")
    for kind in KINDS:
        print(f"    {kind:9}{1000 * step[kind]:9.1f} ms a step {peak[kind]:8.0f} MiB")
    print(f"    speed x {step['textbook'] / step['ours']:.2f}   memory x {peak['ours'] / peak['textbook']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="S,M,G" if torch.cuda.is_available() else "S,M")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name in options.only.split(","):
        benchmark(name, options.rounds)
