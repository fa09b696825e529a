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
    ("E[r] of SFT", lambda r: r["report/sft/reward"]),
    ("E[r] of DPO", lambda r: r["report/dpo/reward"]),
    ("highest E[r] of any policy at DPO's KL", lambda r: r["report/limit/reward"]),
    ("E[r] of DPO as a share of that limit", lambda r: r["report/dpo/reward"] / r["report/limit/reward"]),
    ("KL(π‖π_ref), nats", lambda r: r["report/dpo/kl"]),
    ("probability on well-formed reviews, SFT", lambda r: r["report/sft/valid"]),
    ("probability on well-formed reviews, DPO", lambda r: r["report/dpo/valid"]),
    ("win rate of DPO against SFT", lambda r: r["report/dpo/win_rate"]),
    ("correlation of implicit and true reward", lambda r: r["report/implicit_reward_correlation"]),
    ("held-out preference accuracy", lambda r: r["report/dpo/accuracy"]),
    ("held-out preference accuracy as a share of the Bayes accuracy", lambda r: r["report/dpo/accuracy"] / r["report/limit/accuracy"]),
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
