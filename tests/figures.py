"""Figures of the README: train.py on three seeds and a CPU, mean ± standard deviation over the seeds.

    python -m tests.figures
    python -m tests.figures --beta 0.5      gives the flag to train.py
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time

SEEDS = 0, 1, 2
ROWS = {  # label: figure of a run, from the last line of its metrics.jsonl
    "share of the achievable improvement": lambda row: row["report/objective_share"],
    "KL(π‖π*), from DPO to the optimum, nats": lambda row: row["report/kl_to_optimum"],
    "P(well-formed) of DPO": lambda row: row["report/dpo/valid"],
    "correlation of implicit and true reward": lambda row: row["report/implicit_reward_correlation"],
    "preference accuracy, DPO / optimum": lambda row: row["report/dpo/accuracy"] / row["report/optimum/accuracy"],
    "wall time, seconds": lambda row: row["seconds"],
}


def run(seed, flags):
    """Run train.py. Returns the figures of its report and the seconds that it took."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "--device", "cpu", *flags, "--seed", str(seed), "--out", out],
                       check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        with open(f"{out}/metrics.jsonl") as file:
            return json.loads(file.readlines()[-1]) | {"seconds": seconds}


if __name__ == "__main__":
    rows = [run(seed, sys.argv[1:]) for seed in SEEDS]
    print(f"| held-out prompts, seeds {', '.join(map(str, SEEDS))} | mean ± std |\n|---|---|")
    for label, figure in ROWS.items():
        values = [figure(row) for row in rows]
        digits = 0 if "seconds" in label else 4
        print(f"| {label} | {statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} |")
