"""The table of the README: train.py on several seeds, mean ± standard deviation over them.

    python -m tests.figures              # seeds 0, 1, 2; other flags go to train.py
    python -m tests.figures --beta 0.5
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time

SEEDS = 0, 1, 2
ROWS = (
    ("objective E[r] − β KL: share of the possible gain over SFT", lambda r: r["report/objective_share"]),
    ("KL(π‖π*), nats: from DPO to the optimum", lambda r: r["report/kl_to_optimum"]),
    ("probability of well-formed reviews: DPO", lambda r: r["report/dpo/valid"]),
    ("correlation of implicit and true reward", lambda r: r["report/implicit_reward_correlation"]),
    ("accuracy, divided by that of the true reward", lambda r: r["report/dpo/accuracy"] / r["report/optimum/accuracy"]),
    ("wall time, seconds", lambda r: r["seconds"]),
)

if __name__ == "__main__":
    reports = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            subprocess.run([sys.executable, "train.py", *sys.argv[1:], "--seed", str(seed), "--out", out],
                           check=True, stdout=subprocess.DEVNULL)
            with open(f"{out}/metrics.jsonl") as file:
                reports.append(json.loads(file.readlines()[-1]) | {"seconds": time.perf_counter() - began})
    print(f"| held-out prompts, seeds {', '.join(map(str, SEEDS))} | mean ± std |\n|---|---|")
    for name, value in ROWS:
        values = [value(report) for report in reports]
        digits = 0 if "seconds" in name else 4
        print(f"| {name} | {statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} |")
