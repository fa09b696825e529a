# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""DPO in several processes: each computes its part of every batch, and the gradients are added up.

You need this if one GPU is too slow, but the model still fits on it. In the project's folder:

    torchrun --nproc_per_node 2 -m tests.examples.torchrun --data pairs.jsonl --init out/sft.pt --out several

Each process holds all weights and scores all pairs. It uses the GPU of its local rank, or the CPU.
The result is dpo.pt in --out. There is no SFT, no report and no --resume.
"""
import argparse
import contextlib
import copy
import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for torchrun with a path, not with -m
import data
import train

FLAGS = ("data", "held_out", "block_size", "init", "out", "beta", "label_smoothing", "steps",
         "learning_rate", "batch_size", "grad_accum", "device", "dtype", "seed")
RANK = int(os.environ.get("RANK", 0))  # torchrun numbers the processes


def parse_settings():
    """The command line as a train.Config. The help and the defaults are those of train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = train.fail
    for f in dataclasses.fields(train.Config):
        if f.name in FLAGS:
            parser.add_argument(f"--{f.name}", type=f.type, default=f.default,
                                required=f.name in ("data", "init", "out"),
                                choices=f.metadata["choices"], help=f.metadata["help"])
    cfg = train.Config(**vars(parser.parse_args()))
    if (Path(cfg.out) / "dpo.pt").exists():
        raise ValueError(f"{cfg.out} holds an earlier run: choose another folder with --out")
    return cfg


def read_input():
    """The settings, the reference and the pairs. Only the first process prints the counts."""
    cfg = parse_settings()
    if cfg.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    reference = train.make_model(cfg).requires_grad_(False)
    with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
        task = train.FileTask(cfg, reference)
    return cfg, reference, task.training_pairs


def add_up(gradient):
    """The sum of a parameter's gradient over all processes."""
    total = gradient.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def objective(policy, pairs, cfg):
    """train.dpo_objective on this process's share of a micro-batch. If the share has no pair, one
    pair is computed with weight 0, because each process must take part in each sum."""
    share = pairs[dist.get_rank()::dist.get_world_size()]
    losses, _ = train.dpo_objective(policy, share or pairs[:1], cfg)
    return losses if share else 0 * losses, {}


def main():
    try:
        cfg, reference, pairs = read_input()
    except (OSError, ValueError) as error:
        train.fail(error)
    dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo")
    scored_pairs = train.score_pairs(reference, pairs, cfg)
    policy = copy.deepcopy(reference).requires_grad_(True)
    for p in policy.parameters():
        p.register_hook(add_up)  # before train.train_step clips the sum
    optimizer = train.make_optimizer(policy)
    batches = data.batches(scored_pairs, cfg.batch_size, cfg.seed)  # the same in every process
    for step in range(1, cfg.steps + 1):
        optimizer.param_groups[0]["lr"] = train.warmup_cosine(step, cfg.steps, cfg.learning_rate)
        metrics = train.train_step(policy, optimizer, next(batches), objective, cfg)
        loss = torch.tensor(metrics["loss"], device=cfg.device)  # of this process's pairs
        dist.all_reduce(loss)
        if RANK == 0:
            print(f"step {step}/{cfg.steps}: loss {loss.item():.4f}", flush=True)
    if RANK == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        policy.save(Path(cfg.out) / "dpo.pt")
    dist.barrier()  # torchrun stops all processes when the first one has ended
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # because torch 2.13 sometimes aborts when its own threads end after Python
