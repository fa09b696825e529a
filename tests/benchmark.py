"""What a DPO step costs, beside the textbook's, both in one run: python -m tests.benchmark

    textbook   random batches padded to the longest row; chosen and rejected in rows of their own; logits at
               every position; the reference's forward pass in every step; AdamW as it comes
    ours       train.fit, and a third of the one pass that scores the reference (a run of three epochs; with a
               single epoch the precomputed reference saves nothing)

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
import torch.nn.functional as F

import data
import train
from dpo import dpo_loss, sequence_logps
from model import GPT, GPTConfig

WORKLOADS = {  # vocabulary, layers, channels, heads, prompt lengths, answer lengths, pairs in a batch, batches
    "S": (512, 4, 128, 4, (8, 24), (8, 48), 32, 24),
    "M": (50257, 6, 384, 6, (16, 96), (16, 128), 8, 4),
    "G": (50257, 12, 768, 12, (64, 256), (64, 256), 32, 4),
}
EPOCHS = 3
SAVINGS = {"sorted": "batches of similar length", "packed": "the prompt once for both answers",
           "scored": "vocabulary projection at scored positions only", "constant": "reference scored once",
           "fused": "fused AdamW"}


class Log:
    start = lambda self, stage, steps, **parts: 0
    step = lambda self, *arguments: None


def build(name, seed=0):
    """The model, its reference, the pairs and the settings of a workload."""
    V, layers, C, heads, prompt, answer, batch, batches = WORKLOADS[name]
    torch.manual_seed(seed)
    rng, cuda = np.random.default_rng(seed), torch.cuda.is_available()
    draw = lambda low, high: rng.integers(V, size=rng.integers(low, high + 1)).tolist()
    pairs = [(draw(*prompt), draw(*answer), draw(*answer)) for _ in range(batch * batches)]
    cfg = train.Config(beta=0.1, learning_rate=1e-6, batch_size=batch, steps=batches, seed=seed,
                       dtype="bfloat16" if name == "G" else "float32")
    model = GPT(GPTConfig(V, prompt[1] + answer[1], layers, heads, C)).to("cuda" if cuda else "cpu")
    return model, copy.deepcopy(model), pairs, cfg


def logps_of(model, pairs, cfg, packed, scored):
    """(n, 2) log-probabilities, with the two savings inside a forward pass on or off."""
    with torch.autocast(cfg.device, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32"):
        rows = pairs if packed else [(x, y) for k in (1, 2) for x, y in ((p[0], p[k]) for p in pairs)]
        batch = data.collate(rows, cfg.device)
        if scored:
            logps = model.answer_logps(*batch)
        elif packed:
            tokens, positions, answers, sources = batch
            logits = model.project(model.hidden(tokens, positions, answers)).float()  # (B, T, V), every position
            row, t = answers.nonzero(as_tuple=True)
            each = -F.cross_entropy(logits[row, sources[row, t]], tokens[row, t], reduction="none")
            logps = each.new_zeros(2 * len(pairs)).index_add(0, 2 * row + answers[row, t] - 1, each).view(-1, 2)
        else:
            logps = sequence_logps(model(batch[0]), batch[0], batch[2] > 0)
    return logps if packed else logps.view(2, -1).T


def epoch(model, reference, pairs, cfg, savings, ref_logps):
    """One epoch of DPO with some of the savings."""
    optimizer = torch.optim.AdamW(model.parameters(), **train.ADAMW | {"fused": "fused" in savings})
    lengths = [sum(map(len, pair)) if "sorted" in savings else 0 for pair in pairs]
    batches = data.batches(lengths, cfg.batch_size, cfg.seed)
    on = {name: name in savings for name in ("packed", "scored")}
    for step, batch in zip(range(cfg.steps), batches):
        part = [pairs[i] for i in batch]
        logps, constants = logps_of(model, part, cfg, **on), ref_logps[batch]
        if "constant" not in savings:
            with torch.no_grad():
                constants = logps_of(reference, part, cfg, **on)
        loss = dpo_loss(*logps.T, *constants.T, cfg.beta)[0].mean()
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, cfg.steps, cfg.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()


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
    if kind == "ours":
        scoring = seconds(lambda: train.score(reference, pairs, cfg)) / EPOCHS
        return scoring + seconds(lambda: train.fit(model, pairs, cfg, Log(), ref_logps))
    savings = set() if kind == "textbook" else set(SAVINGS) - {kind}
    scoring = seconds(lambda: train.score(reference, pairs, cfg)) / EPOCHS if "constant" in savings else 0
    return scoring + seconds(lambda: epoch(model, reference, pairs, cfg, savings, ref_logps))


def check(model, pairs, cfg):
    """Largest difference of losses and of gradients (relative to the largest) between the two."""
    results, constants = [], train.score(model, pairs[:cfg.batch_size], cfg).mean(0)
    for on in (False, True):
        logps = logps_of(model, pairs[:cfg.batch_size], cfg, on, on)
        losses = dpo_loss(*logps.T, *constants.expand_as(logps).T, cfg.beta)[0]
        gradient = torch.autograd.grad(losses.mean(), list(model.parameters()))
        results.append((losses.detach(), torch.cat([g.flatten() for g in gradient])))
    (loss, gradient), (other_loss, other_gradient) = results
    return (loss - other_loss).abs().max().item(), ((gradient - other_gradient).abs().max() / gradient.abs().max()).item()


def least_flops(pairs, shape):
    """Of an epoch: forward and twice that backward; the prompt once, the projection at answers only."""
    V, layers, C = shape[:3]
    total = 0
    for x, y_w, y_l in pairs:
        n, w, l = len(x), len(y_w), len(y_l)
        reads = n * n / 2 + w * (n + w / 2) + l * (n + l / 2)  # pairs of tokens in attention
        total += 3 * (layers * (24 * C * C * (n + w + l) + 4 * C * reads) + 2 * C * V * (w + l))
    return total


def matmul_rate(pairs, shape, cfg):
    """FLOP/s of bare matrix products at the model's own shapes, for one batch of average size."""
    V, layers, C = shape[:3]
    share = cfg.batch_size / len(pairs)
    tokens, scored = (int(share * sum(map(count, pairs))) for count in (
        lambda p: len(p[0]) + len(p[1]) + len(p[2]), lambda p: len(p[1]) + len(p[2])))
    dtype, flops, spent = getattr(torch, cfg.dtype), 0, 0.0
    for rows, inner, columns, times in ((tokens, C, 3 * C, layers), (tokens, C, C, layers), (tokens, C, 4 * C, layers),
                                        (tokens, 4 * C, C, layers), (scored, C, V, 1)):
        a, b = (torch.randn(s, dtype=dtype, device=cfg.device) for s in ((rows, inner), (columns, inner)))
        F.linear(a, b)
        spent += times * min(seconds(lambda: F.linear(a, b)) for _ in range(10))
        flops += times * 2 * rows * inner * columns
    return flops / spent


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
    spent, rates = {kind: [] for kind in kinds}, []
    for i in range(rounds + 1):  # the first round warms up
        cfg.seed = i
        for kind in kinds:
            spent[kind].append(run(kind, copy.deepcopy(model), reference, pairs, cfg, ref_logps))
        rates.append(matmul_rate(pairs, WORKLOADS[name], cfg))
    step = {kind: statistics.median(times[1:]) / cfg.steps for kind, times in spent.items()}
    peak = {kind: memory(name, kind) for kind in ("textbook", "ours")}
    rate = statistics.median(rates)
    useful = sum(2 * len(x) + len(y_w) + len(y_l) for x, y_w, y_l in pairs) / cfg.steps
    fraction = least_flops(pairs, WORKLOADS[name]) / cfg.steps / (rate * step["ours"])
    print(f"\n{name}: losses equal to {loss_gap:.1e}, gradients to {gradient_gap:.1e} of the largest")
    for kind in ("textbook", "ours"):
        print(f"    {kind:9}{1000 * step[kind]:9.1f} ms a step {useful / step[kind]:9.0f} useful tokens/s {peak[kind]:8.0f} MiB")
    print(f"    speed x {step['textbook'] / step['ours']:.2f}   memory x {peak['ours'] / peak['textbook']:.2f}   "
          f"{fraction:.2f} of the matmul rate ({rate / 1e9:.0f} GFLOP/s)")
    for kind in kinds[2:]:
        print(f"    without {SAVINGS[kind]:50}{1000 * step[kind]:9.1f} ms, x {step[kind] / step['ours']:.2f}")
    return {"speed_ratio": step["textbook"] / step["ours"], "memory_ratio": peak["ours"] / peak["textbook"],
            "matmul_fraction": fraction}


def story():
    """Where the seconds of `python train.py` go."""
    spent, inside = {"start-up": seconds(lambda: subprocess.run([sys.executable, "-c", "import train"], check=True))}, []
    def timed(name, function):
        def call(*arguments):
            key = {"fit": "SFT" if len(arguments) == 4 else "DPO"}.get(name, name)
            inside.append(key)
            began = time.perf_counter()
            result = function(*arguments)
            inside.pop()
            if not inside:  # what another timed function calls is counted there
                spent[key] = spent.get(key, 0) + time.perf_counter() - began
            return result
        return call
    for name, shown in {"fit": "fit", "make_pairs": "samples, labels", "score": "reference", "report_exactly": "report"}.items():
        setattr(train, name, timed(shown, getattr(train, name)))
    with tempfile.TemporaryDirectory() as out:
        total = spent["start-up"] + seconds(lambda: train.main(["--out", out]))
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
