"""What a DPO step costs, beside the textbook's, both in one run: python -m tests.benchmark

    textbook   random batches, padded to the longest row; chosen and rejected in rows of their own; logits at
               every position; the reference's forward pass in every step; AdamW as it comes
    ours       what train.py does, and a third of the one pass that scores the reference: that of three epochs
               (with a single epoch to score it once saves nothing; train.py's default is two)

    --only S,M,G        workloads; G, GPT-2 124M in bfloat16, needs a GPU
    --against           each saving of ours switched off in turn
    --rounds 5          rounds of one epoch each, textbook and ours in turn; the median counts
    --json FILE         the ratios
    --story             instead of all that: where the seconds of train.py go
"""
import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

import data
import train
from dpo import sequence_logps
from model import GPT, GPTConfig

WORKLOADS = {  # vocabulary, layers, channels, heads, prompt lengths, completion lengths, pairs in a batch, batches
    "S": (512, 4, 128, 4, (8, 24), (8, 48), 32, 24),
    "M": (50257, 6, 384, 6, (16, 96), (16, 128), 8, 4),
    "G": (50257, 12, 768, 12, (64, 256), (64, 256), 32, 4),
}
EPOCHS = 3
SAVINGS = {"sorted": "batches of similar length", "shared": "the prompt once for both completions",
           "constant": "the reference scored once", "fused": "fused AdamW"}


def build(name, seed=0):
    """The model, its reference, the pairs and the settings of a workload."""
    V, layers, C, heads, prompt, completion, batch, batches = WORKLOADS[name]
    torch.manual_seed(seed)
    rng, cuda = np.random.default_rng(seed), torch.cuda.is_available()
    draw = lambda low, high: rng.integers(V, size=rng.integers(low, high + 1)).tolist()
    pairs = [(draw(*prompt), draw(*completion), draw(*completion)) for _ in range(batch * batches)]
    cfg = train.Config(beta=0.1, learning_rate=1e-6, batch_size=batch, steps=batches, seed=seed,
                       dtype="bfloat16" if name == "G" else "float32")
    model = GPT(GPTConfig(V, prompt[1] + completion[1], layers, heads, C)).to("cuda" if cuda else "cpu")
    return model, copy.deepcopy(model).requires_grad_(False), pairs, cfg


def textbook_logps(model, pairs, cfg):
    """(n, 2) by sequence_logps, from logits at every position of rows that hold one completion each."""
    rows = [(pair[0], pair[k]) for k in (1, 2) for pair in pairs]
    tokens, positions, segments = data.collate(rows, cfg.device)
    mask = (segments > 0) & (positions >= torch.tensor([[len(x)] for x, _ in rows], device=cfg.device))
    with torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
        return sequence_logps(model(tokens), tokens, mask).view(2, -1).T


def logps_of(model, pairs, cfg, savings):
    """(n, 2), with or without what is saved inside a forward pass."""
    if "shared" in savings:
        return train.logps_of(model, pairs, cfg)
    if savings:  # the prompt runs twice, but only scored positions are projected
        return train.logps_of(model, [(pair[0], pair[k]) for k in (1, 2) for pair in pairs], cfg).view(2, -1).T
    return textbook_logps(model, pairs, cfg)


def epoch(model, reference, pairs, cfg, savings, ref_logps):
    """One epoch of DPO through train.fit."""
    optimizer = torch.optim.AdamW(model.parameters(), **train.ADAMW | {"fused": "fused" in savings})
    lengths = [sum(map(len, pair)) if "sorted" in savings else 0 for pair in pairs]

    def loss_of(batch):
        part = [pairs[i] for i in batch]
        with torch.no_grad():
            constants = ref_logps[batch] if "constant" in savings else logps_of(reference, part, cfg, savings)
        return train.pair_metrics(logps_of(model, part, cfg, savings), constants, cfg)

    list(train.fit(model, optimizer, lengths, loss_of, cfg.steps, cfg.learning_rate, cfg))


def seconds(call):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run(kind, model, reference, pairs, cfg, ref_logps):
    """Seconds of an epoch: textbook, ours, or ours without one of its savings."""
    savings = set() if kind == "textbook" else set(SAVINGS) - {kind}
    scoring = seconds(lambda: train.score(reference, pairs, cfg)) / EPOCHS if "constant" in savings else 0
    return scoring + seconds(lambda: epoch(model, reference, pairs, cfg, savings, ref_logps))


def check(model, pairs, cfg):
    """Largest difference of losses and of gradients (relative to the largest) between the two."""
    results, part = [], pairs[:cfg.batch_size]
    constants = train.score(model, part, cfg).mean(0)
    for savings in (set(), set(SAVINGS)):
        logps = logps_of(model, part, cfg, savings)
        losses = train.pair_metrics(logps, constants.expand_as(logps), cfg)["loss"]
        gradient = torch.autograd.grad(losses.mean(), list(model.parameters()))
        results.append((losses.detach(), torch.cat([g.flatten() for g in gradient])))
    (loss, gradient), (other_loss, other_gradient) = results
    return (loss - other_loss).abs().max().item(), ((gradient - other_gradient).abs().max() / gradient.abs().max()).item()


def memory(name, kind):
    """Peak of a child process that runs an epoch, MiB: resident on the CPU, allocated on a GPU."""
    code = f"from tests import benchmark as b; b.child({name!r}, {kind!r})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def child(name, kind):
    model, reference, pairs, cfg = build(name)
    run(kind, model, reference, pairs, cfg, train.score(reference, pairs, cfg))
    with open("/proc/self/status") as file:  # not ru_maxrss, which a child inherits from its parent
        resident = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    print(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident / 2**10)


def benchmark(name, rounds, against):
    model, reference, pairs, cfg = build(name)
    ref_logps = train.score(reference, pairs, cfg)
    loss_gap, gradient_gap = check(model, pairs, cfg)
    kinds = ["textbook", "ours", *(SAVINGS if against else ())]
    spent = {kind: [] for kind in kinds}
    for i in range(rounds + 1):  # the first round warms up
        cfg.seed = i
        for kind in kinds:
            spent[kind].append(run(kind, copy.deepcopy(model), reference, pairs, cfg, ref_logps))
    step = {kind: statistics.median(times[1:]) / cfg.steps for kind, times in spent.items()}
    peak = {kind: memory(name, kind) for kind in ("textbook", "ours")}
    print(f"\n{name}: losses equal to {loss_gap:.1e}, gradients to {gradient_gap:.1e} of the largest")
    for kind in ("textbook", "ours"):
        print(f"    {kind:9}{1000 * step[kind]:9.1f} ms a step {peak[kind]:8.0f} MiB")
    print(f"    speed x {step['textbook'] / step['ours']:.2f}   memory x {peak['ours'] / peak['textbook']:.2f}")
    for kind in kinds[2:]:
        print(f"    without {SAVINGS[kind]:40}{1000 * step[kind]:9.1f} ms, x {step[kind] / step['ours']:.2f}")
    return {"speed_ratio": step["textbook"] / step["ours"], "memory_ratio": peak["ours"] / peak["textbook"]}


def story():
    """Where the seconds of `python train.py` go."""
    spent = {"start-up": seconds(lambda: subprocess.run([sys.executable, "-c", "import train"], check=True))}

    def timed(function, name):
        def call(*arguments):
            result = []
            spent[arguments[1] if name == "stage" else name] = seconds(lambda: result.append(function(*arguments)))
            return result[0]
        return call

    train.Run.train = timed(train.Run.train, "stage")
    train.make_pairs = timed(train.make_pairs, "samples and labels")
    train.report_exactly = timed(train.report_exactly, "report")
    with tempfile.TemporaryDirectory() as out:
        total = spent["start-up"] + seconds(lambda: train.main(["--out", out]))
    spent["reference and the rest"] = total - sum(spent.values())
    print("\nseconds: " + ", ".join(f"{name} {value:.1f}" for name, value in spent.items()) + f"; in all {total:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="S,M,G" if torch.cuda.is_available() else "S,M")
    parser.add_argument("--against", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--story", action="store_true")
    options = parser.parse_args()
    if options.story:
        sys.exit(story())
    results = {name: benchmark(name, options.rounds, options.against) for name in options.only.split(",")}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file)
