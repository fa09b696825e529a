"""DPO in several processes. Each one computes its part of every batch, and the gradients are added up.

    torchrun --nproc_per_node 2 tests/several_processes.py --data pairs.jsonl --init out/sft.pt --out several

Each process holds all weights and scores all pairs. It uses the GPU of its local rank, or the CPU.
The result is dpo.pt in --out. There is no SFT, no report and no --resume.
"""
import argparse
import copy
import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train

FLAGS = ("data", "held_out", "init", "out", "beta", "steps", "learning_rate", "batch_size", "grad_accum", "device", "dtype", "seed")


def parse_settings():
    """The command line as a train.Config. The help and the defaults are those of train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in dataclasses.fields(train.Config):
        if f.name in FLAGS:
            parser.add_argument(f"--{f.name}", type=f.type, default=f.default, required=f.name in ("data", "init", "out"),
                                choices=f.metadata["choices"], help=f.metadata["help"])
    cfg = train.Config(**vars(parser.parse_args()))
    if (Path(cfg.out) / "dpo.pt").exists():
        parser.error(f"{cfg.out} holds an earlier run: choose another folder with --out")
    return cfg


def add_up(gradient):
    """The sum of a parameter's gradient over all processes."""
    total = gradient.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def objective(policy, pairs, cfg):
    """train.dpo_objective on every world-th pair of a micro-batch, which may leave no pair for this process.
    Then it computes one pair with weight 0, because each process must take part in each sum."""
    part = pairs[dist.get_rank()::dist.get_world_size()]
    losses, _ = train.dpo_objective(policy, part or pairs[:1], cfg)
    return losses if part else 0 * losses, {}


def main():
    cfg = parse_settings()
    on_gpu = cfg.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    reference = train.load_model(cfg).to(cfg.device).requires_grad_(False)
    pairs, counts, _ = data.encode_pairs(data.read_jsonl(cfg.data), data.get_tokenizer(cfg.tokenizer), cfg.block_size)
    training_pairs, _ = data.split_pairs(pairs, cfg.held_out, cfg.block_size, cfg.seed)
    if dist.get_rank() == 0:
        print(*(f"{n:10,} {text}" for text, n in counts.items()), sep="\n")
    scored_pairs = train.score_pairs(reference, training_pairs, cfg)

    policy = copy.deepcopy(reference).requires_grad_(True)
    for p in policy.parameters():
        p.register_hook(add_up)  # train.fit clips the sum
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    batches = data.batches(scored_pairs, cfg.batch_size, cfg.seed)  # the same in every process
    for step, metrics in train.fit(policy, optimizer, batches, objective, cfg.steps, cfg.learning_rate, cfg):
        loss = torch.tensor(metrics["loss"], device=cfg.device)  # of this process's pairs
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            print(f"step {step}/{cfg.steps}: loss {loss.item():.4f}", flush=True)
    if dist.get_rank() == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        policy.save(Path(cfg.out) / "dpo.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
