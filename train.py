# SPDX-License-Identifier: MIT
"""From a corpus to preferences, the DPO paper's road: SFT -> pairs -> reference -> DPO -> report.

    python train.py                        # the toy world: about 40 s on a CPU core
    python train.py --beta 0.5 --seed 1    # every setting is a flag: python train.py --help
    python train.py --data pairs.jsonl --init pytorch_model.bin    # your own pairs, from GPT-2

Writes into --out: sft.pt, dpo.pt, metrics.jsonl with every step's metrics, state.pt for --resume.
Read it from main(), at the end.
"""
import argparse
import copy
import itertools
import json
import math
import signal
import sys
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

import data
from dpo import dpo_loss, optimal_logps, preference_metrics
from model import GPT, GPTConfig, MAX_TOKENS, load_checkpoint, save_checkpoint

ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
WITH_INIT = {"sft_learning_rate": 1e-5, "learning_rate": 1e-6, "beta": 0.1}  # defaults for GPT-2
LEAST = {"block_size": 16, "held_out": 0, "sft_steps": 0, "label_smoothing": 0, "seed": 0}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
COLUMNS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
           "logps/chosen": "chosen", "logps/rejected": "rejected",
           "eval/loss": "held-out", "eval/rewards/accuracies": "(acc.)"}


def option(default, help, choices=None, group=None):  # group: a heading in --help, from here on
    return field(default=default, metadata={"help": help, "choices": choices, "group": group})


@dataclass
class Config:
    data: str = option(None, "JSONL of prompt, chosen, rejected; else the toy world", group="data")
    held_out: float = option(0.1, "fraction of the prompts of --data to hold out")
    tokenizer: str = option("auto", "tokenizer for --data; auto: that of --init, without it gpt2",
                            ("auto", "toy", "gpt2"))
    block_size: int = option(256, "longest prompt with its completion, in tokens")
    n_pairs: int = option(32768, "preference pairs to sample in the toy world")
    n_reviews: int = option(20000, "reviews in the SFT corpus of the toy world")
    init: str = option(None, "start from a checkpoint, or GPT-2's pytorch_model.bin", group="model")
    n_layer: int = option(1, "transformer blocks, without --init")
    n_head: int = option(4, "attention heads in a block, without --init")
    n_embd: int = option(64, "channels, a multiple of n_head, without --init")
    sft_steps: int = option(1000, "steps, one batch each; 0 for none", group="SFT")
    sft_learning_rate: float = option(4e-3, "peak learning rate; with --init 1e-5")
    steps: int = option(1000, "steps, one batch each", group="DPO")
    learning_rate: float = option(1e-3, "peak learning rate; with --init 1e-6")
    beta: float = option(1.0, "strength of the KL penalty; with --init 0.1")
    label_smoothing: float = option(0.0, "fraction of labels believed flipped, below 0.5")
    batch_size: int = option(64, "texts (SFT) or pairs (DPO) in a batch", group="run")
    grad_accum: int = option(1, "parts in which a batch is run, to save memory")
    device: str = option(DEVICES[-1], "cpu, or cuda, the default with a GPU", DEVICES)
    dtype: str = option("auto", "type in matrix products; auto: bfloat16 on a GPU, else float32",
                        ("auto", "float32", "bfloat16", "float16"))
    seed: int = option(0, "seed of weights, data, samples and batches")
    out: str = option("out", "folder for checkpoints and metrics")
    save_every: int = option(100, "steps between two states to resume from")
    resume: bool = option(False, "continue from the state in --out, if there is one")

    def __post_init__(self):
        for f in fields(self):
            if f.type in (int, float):
                value, least = getattr(self, f.name), LEAST.get(f.name)
                if not (0 < value < 2**32 if least is None else least <= value < 2**32):
                    bound = "above 0" if least is None else f"at least {least}"
                    raise ValueError(f"expected {f.name} {bound} and below 2**32, got {value}")
        dpo_loss(*torch.zeros(4, 1), self.beta, label_smoothing=self.label_smoothing)  # checks both
        if self.dtype == "auto":
            self.dtype = "float32" if self.device == "cpu" else "bfloat16"


def parse_config(arguments=None):
    """The command line, made from Config's fields."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = fail
    for f in fields(Config):
        text, choices, group = f.metadata.values()
        if group:
            section = parser.add_argument_group(group)
        kind = dict(action="store_true") if f.type is bool else dict(
            type=f.type, choices=choices, metavar="")
        shown = f" (default: {f.default})" if f.type in (int, float) else ""
        section.add_argument(f"--{f.name}", default=f.default, help=text + shown, **kind)
    if parser.parse_args(arguments).init:
        parser.set_defaults(**WITH_INIT)
    return Config(**vars(parser.parse_args(arguments)))


def fail(message):
    print("error:", str(message).split("\n")[0], file=sys.stderr)
    sys.exit(2)


def learning_rate(step, steps, peak):
    """For step 1 … steps: up to the peak in the first tenth, then along a cosine towards 0."""
    warmup = math.ceil(steps / 10)
    cosine = (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup + 1))) / 2
    return peak * min(step, warmup) / warmup * cosine


def fit(model, optimizer, lengths, loss_of, steps, peak, cfg, start=0):
    """The training loop, a generator: yields (step, mean metrics of the batch) after each step.

    lengths  tokens of each example, for batches of similar lengths
    loss_of  an array of b example numbers -> {name: (b,)}, of which "loss" carries the gradient
    steps    steps in all, of which start are done; peak is the highest learning rate
    cfg      batch_size, grad_accum, seed, device, dtype
    raises ValueError if the loss or its gradient is not finite, before the weights change; in
             float16 a step with such a gradient is skipped, since the scaler may overflow
    """
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.dtype == "float16")
    batches = itertools.islice(data.batches(lengths, cfg.batch_size, cfg.seed), start, steps)
    for step, batch in enumerate(batches, start + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        optimizer.zero_grad()
        sums = 0
        for part in np.array_split(batch, min(cfg.grad_accum, len(batch))):
            results = loss_of(part)
            scaler.scale(results["loss"].sum() / len(batch)).backward()  # parts add up to the mean
            sums += torch.stack([value.detach().sum() for value in results.values()])
        metrics = dict(zip(results, (sums / len(batch)).tolist()))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (math.isfinite(metrics["loss"]) and (scaler.is_enabled() or norm.isfinite())):
            raise ValueError(f"step {step}: loss {metrics['loss']}, gradient {norm}; is the "
                             f"learning rate too high? Batch: {sorted(batch.tolist())}")
        scaler.step(optimizer)
        scaler.update()
        yield step, metrics


def logps_of(model, examples, cfg):
    """log π(y|x) of the K completions in each (prompt, completion, …) of a batch: (B, K), nats, as
    dpo.sequence_logps defines it. Matrix products run in cfg.dtype; weights, log-softmax and sums
    stay in float32."""
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
    return torch.cat(logps)[np.argsort(order)]  # in the order of the examples


def pair_metrics(policy_logps, ref_logps, cfg):
    """The DPO loss and the field's metrics of pairs, {name: (b,)}, from log π(y|x) under the policy
    and under the reference: (b, 2) each, the chosen completion, then the rejected."""
    policy_chosen_logps, policy_rejected_logps = policy_logps.unbind(1)
    ref_chosen_logps, ref_rejected_logps = ref_logps.unbind(1)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, cfg.beta,
        label_smoothing=cfg.label_smoothing)
    return preference_metrics(losses, chosen_rewards, rejected_rewards,
                              policy_chosen_logps, policy_rejected_logps)


def sample(model, prompts, max_new_tokens, cfg, tokenizer):
    """A completion y ~ π(·|x) of each prompt, the same ones whenever it is called."""
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    return model.sample(prompts, max_new_tokens, 1.0, tokenizer.eot_token, generator)


def make_pairs(sft, prompts, cfg, tokenizer):
    """Sample y1, y2 ~ π_SFT(·|x) and let the labeller choose: [(prompt, chosen, rejected)] ids."""
    texts = [prompts[i % len(prompts)] for i in range(cfg.n_pairs)]
    ids = [tokenizer.encode_ordinary(x) for x in texts]
    both = sample(sft, ids + ids, data.MAX_NEW_TOKENS, cfg, tokenizer)
    rewards = [data.reward(x, data.decode(tokenizer, y)) for x, y in zip(texts + texts, both)]
    rewards = np.array(rewards).reshape(2, -1)  # of the first and of the second completion
    wins = data.prefers_first(*rewards, np.random.default_rng((cfg.seed, 2)))
    pairs = [(x, y1, y2) if first_wins else (x, y2, y1) for x, y1, y2, first_wins in zip(
        ids, both[:cfg.n_pairs], both[cfg.n_pairs:], wins) if y1 != y2]
    if not pairs:
        raise ValueError("expected pairs of different samples, but each pair's two are identical")
    print(f"\n{cfg.n_pairs:,} pairs: {cfg.n_pairs - len(pairs):,} identical dropped, "
          f"{(rewards.min(0) == data.MALFORMED).sum():,} hold malformed text")
    return pairs


def outcome_logps(model, prompts, cfg, tokenizer):
    """(X, 1885) float64: log π of every review and, last, of all malformed text together."""
    reviews = [data.encode(tokenizer, "", y)[1] for y in data.REVIEWS]
    rows = [(tokenizer.encode_ordinary(x), *reviews[i:i + 12])  # a dozen completions a row
            for x in prompts for i in range(0, len(reviews), 12)]
    logps = score(model, rows, cfg).double().view(len(prompts), -1).cpu()
    rest = (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
    return torch.cat([logps, rest], dim=-1)


def report_exactly(reference, policy, prompts, cfg, tokenizer):
    """Print and return the exact figures of SFT, DPO and the optimum of RLHF (Eq. 4)."""
    rewards = data.outcome_rewards(prompts)
    sft, dpo = (outcome_logps(model, prompts, cfg, tokenizer) for model in (reference, policy))
    rows = {name: data.exact_figures(logps, sft, rewards, cfg.beta) for name, logps in (
        ("sft", sft), ("dpo", dpo), ("optimum", optimal_logps(sft, rewards, cfg.beta)))}
    start, reached, best = (row["objective"] for row in rows.values())
    correlations = [torch.corrcoef(torch.stack([change, r])[:, :-1])[0, 1]  # of the reviews
                    for change, r in zip(dpo - sft, rewards)]
    figures = {"objective_share": (reached - start) / (best - start) if best > start else math.nan,
               "kl_to_optimum": (best - reached) / cfg.beta,  # best - reached = β KL(π‖π*)
               "implicit_reward_correlation": torch.stack(correlations).mean().item()}
    title = f"{len(prompts)} held-out prompts, exact"
    print(f"\n{title:28}" + "".join(f"{name.upper():>10}" for name in rows))
    for figure, label in data.FIGURES.items():
        print(f"{label:28}" + "".join(f"{row[figure]:10.4f}" for row in rows.values()))
    print("DPO reaches {objective_share:.1%} of the possible gain of the objective over SFT.\n"
          "KL(π‖π*) is {kl_to_optimum:.4f} nats. Over all reviews implicit and true reward\n"
          "correlate at {implicit_reward_correlation:.4f}.".format(**figures))
    figures |= {f"{name}/{figure}": row[figure] for name, row in rows.items() for figure in row}
    return figures


def report_on_pairs(reference, policy, pairs, cfg, tokenizer):
    """Print and return what needs no true reward, the mean metrics of held-out pairs."""
    metrics = pair_metrics(score(policy, pairs, cfg), score(reference, pairs, cfg), cfg)
    figures = {name: value.mean().item() for name, value in metrics.items()}
    print(f"\n{len(pairs)} held-out pairs (before DPO: loss 0.693, accuracies 0.5, margins 0)")
    for name, value in figures.items():
        print(f"    {name:22}{value:9.3f}")
    return figures


def report_on_samples(reference, policy, prompts, max_new_tokens, cfg, tokenizer):
    """Print a completion of SFT and of DPO to each of four prompts, and KL(π‖π_ref) as the mean of
    log π(y|x) - log π_ref(y|x) over a sample y ~ π to each prompt. Returns it and its error."""
    before = sample(reference, prompts[:4], max_new_tokens, cfg, tokenizer)
    after = sample(policy, prompts, max_new_tokens, cfg, tokenizer)
    for prompt, y, better_y in zip(prompts, before, after):
        print(f"\n{tokenizer.decode(prompt)!r:.80}\n    SFT {data.decode(tokenizer, y)!r:.71}\n"
              f"    DPO {data.decode(tokenizer, better_y)!r:.71}")
    examples = list(zip(prompts, after))
    log_ratios = score(policy, examples, cfg) - score(reference, examples, cfg)
    kl, error = log_ratios.mean().item(), log_ratios.std().item() / len(examples) ** 0.5
    print(f"\nKL(π‖π_ref) from {len(examples)} samples: {kl:.3f} ± {error:.3f} nats")
    return {"kl": kl, "kl_error": error}


class Run:
    """The folder --out: metrics.jsonl, and state.pt, from which --resume continues. A state holds
    the metrics so far, each stage's step and weights, and the optimizer of the one in training. No
    random state: samples, labels and batches come out the same again from the seed."""

    def __init__(self, cfg, model, texts):
        """Open --out for a run of cfg that begins with this model and these texts."""
        out = Path(cfg.out)
        for path in cfg.data, cfg.init:
            if path and out.resolve() in (Path(path).resolve().parent, Path(path).parent.resolve()):
                raise ValueError(f"{path}: this run could overwrite it; choose another --out")
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        modules = [Path(data.__file__).with_name(f"{name}.py").read_bytes()
                   for name in ("dpo", "model", "data", "train")]
        made_with = asdict(replace(cfg, data=None, init=None, out="", save_every=1, resume=False))
        made_with |= {
            "texts": zlib.crc32(repr(texts).encode()), "weights": zlib.crc32(weights.numpy()),
            "version": zlib.crc32(b"".join(modules)), "torch": str(torch.__version__),
            "threads": torch.get_num_threads(), "model": str(model.config)}
        out.mkdir(parents=True, exist_ok=True)
        self.cfg, self.path, metrics = cfg, out / "state.pt", out / "metrics.jsonl"
        self.state = {"made_with": made_with, "metrics": []}
        if cfg.resume and self.path.exists():
            self.state = load_checkpoint(self.path)
            for name, value in made_with.items():
                if self.state.get("made_with", {}).get(name) != value:
                    raise ValueError(f"{self.path}: not a state, or made with another {name}")
        else:
            old = filter(Path.exists, [metrics, self.path, out / "sft.pt", out / "dpo.pt"])
            if moved := [file.replace(f"{file}.old").name for file in old]:
                print(f"{out}: earlier files are now called {', '.join(moved)}")
        save_checkpoint(self.path, self.state)  # first, so that --resume moves nothing aside
        new = out / "metrics.jsonl.tmp"
        new.write_text("".join(self.state["metrics"]))
        self.file = open(new.replace(metrics), "a")

    def train(self, stage, model, examples, loss_of, steps, peak, held_out=()):
        """Fit what is left of a stage. After each tenth print its mean metrics, and those of the
        held-out example numbers. Save every save_every steps and at the end; ValueError instead if
        the loss of four examples is then not finite."""
        optimizer, done = torch.optim.AdamW(model.parameters(), **ADAMW), 0
        if stage in self.state:
            done, weights, moments = self.state[stage]
            model.load_state_dict(weights)
            if moments:
                optimizer.load_state_dict(moments)
        lengths = [sum(map(len, example)) for example in examples]
        watch, recent, began = torch.no_grad()(loss_of), [], time.perf_counter()
        for step, metrics in fit(model, optimizer, lengths, loss_of, steps, peak, self.cfg, done):
            due = step * 10 // steps > (step - 1) * 10 // steps  # ten times a stage
            if due and len(held_out):
                metrics |= {f"eval/{name}": x.mean().item() for name, x in watch(held_out).items()}
            recent.append(metrics)
            self.write(stage=stage, step=step, **metrics)
            if step % self.cfg.save_every == 0 or step == steps:
                if not watch(np.arange(min(4, len(examples))))["loss"].isfinite().all():
                    raise ValueError(f"step {step}: the loss after it is not finite; is the "
                                     "learning rate too high?")
                moments = optimizer.state_dict() if step < steps else None
                self.state[stage] = step, model.state_dict(), moments
                save_checkpoint(self.path, self.state)
            if due:
                left = (time.perf_counter() - began) / (step - done) * (steps - step)
                print_row(stage, step, steps, recent, left, first=len(recent) == step - done)
                recent = []
        optimizer.zero_grad()  # frees the gradients; the moments go with the optimizer

    def write(self, **metrics):
        """Add a line to metrics.jsonl. A figure that is not finite becomes null, as JSON wants."""
        metrics = {name: value if isinstance(value, str) or math.isfinite(value) else None
                   for name, value in metrics.items()}
        self.state["metrics"].append(json.dumps(metrics) + "\n")
        self.file.write(self.state["metrics"][-1])
        self.file.flush()


def print_row(stage, step, steps, recent, seconds_left, first):
    """Print the mean metrics of recent steps; first, above them, what they are."""
    row = {label: np.mean([metrics[name] for metrics in recent if name in metrics])
           for name, label in COLUMNS.items() if name in recent[-1]}
    if first:
        print(f"\n{'step':>13}" + "".join(f"{label:>9}" for label in row) + " ETA")
    figures = "".join(f"{mean:9.3f}" for mean in row.values())
    print(f"{stage:4}{f'{step}/{steps}':>9}{figures}{seconds_left:3.0f}s", flush=True)


def first_model(cfg):
    """The model to start from, and its tokenizer. ValueError where --init is not what flags say."""
    model = None if cfg.init is None else GPT.load(cfg.init)
    name = cfg.tokenizer if cfg.data else "toy"
    if name == "auto":
        name = model.config.tokenizer if model else "gpt2"
    tokenizer = data.get_tokenizer(name)
    n = tokenizer.n_vocab
    model = model or GPT(GPTConfig(n, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, name))
    has = model.config
    if (has.tokenizer, has.vocab_size) != (name, n) or has.block_size < cfg.block_size:
        raise ValueError(f"{cfg.init}: expected tokenizer {name}, {n} tokens and block_size "
                         f"{cfg.block_size} or more, got {has}")
    return model, tokenizer


def main(arguments=None):
    cfg = parse_config(arguments)
    torch.manual_seed(cfg.seed)
    texts = data.prompts() if cfg.data is None else data.read_jsonl(cfg.data)
    sft, tokenizer = first_model(cfg)
    if cfg.data:
        pairs, test, counts = data.split_pairs(
            texts, tokenizer, cfg.block_size, cfg.held_out, cfg.seed)
        print("pairs:", *(f"{n:10,} {name}" for name, n in counts.items()), sep="\n")
        corpus = [(x, chosen) for x, chosen, _ in pairs]
        longest = cfg.block_size // 2  # no completion is longer
        test_prompts = list(map(list, dict.fromkeys(tuple(x[-longest:]) for x, _, _ in test)))
    else:
        prompts, test = texts  # to train on and held out; test holds prompts, above pairs
        reviews = data.corpus(prompts, cfg.n_reviews, np.random.default_rng((cfg.seed, 1)))
        corpus = [data.encode(tokenizer, x, y) for x, y in reviews]
        longest = data.MAX_NEW_TOKENS
        test_prompts = [tokenizer.encode_ordinary(x) for x in test]
    if sum(p.numel() for p in sft.parameters()) < 2**20:
        torch.set_num_threads(1)  # several would wait for each other more than they compute
    run = Run(cfg, sft, texts)
    sft.to(cfg.device)

    # 1. Supervised fine-tuning: maximum likelihood on what people write, or on what they preferred.
    mean_length = np.mean([len(y) for _, y in corpus])

    def sft_loss(batch):
        logps = logps_of(sft, [corpus[i] for i in batch], cfg)[:, 0]  # (b,)
        return {"loss": -logps / mean_length}  # in nats per token, on average

    run.train("SFT", sft, corpus, sft_loss, cfg.sft_steps, cfg.sft_learning_rate)
    sft.save(Path(cfg.out, "sft.pt"))

    # 2. Preferences: from the file, or a simulated human picks one of two samples of that model.
    if not cfg.data:
        pairs = make_pairs(sft, prompts, cfg, tokenizer)

    # 3. The reference is the SFT model. Its log-probabilities are constants: once is enough.
    reference = sft.requires_grad_(False)  # the same object, frozen
    scored = pairs + (test[:32] if cfg.data else [])  # with held-out pairs to watch in training
    ref_logps = score(reference, scored, cfg)  # (n, 2)

    # 4. DPO, on a copy.
    policy = copy.deepcopy(reference).requires_grad_(True)

    def dpo_metrics(batch):
        policy_logps = logps_of(policy, [scored[i] for i in batch], cfg)  # (b, 2)
        return pair_metrics(policy_logps, ref_logps[batch], cfg)

    held_out = np.arange(len(pairs), len(scored))
    run.train("DPO", policy, pairs, dpo_metrics, cfg.steps, cfg.learning_rate, held_out)
    policy.save(Path(cfg.out, "dpo.pt"))

    # 5. What came out, on held-out prompts: in the toy world, against the truth.
    if test:
        report = report_on_pairs if cfg.data else report_exactly
        cfg32 = replace(cfg, dtype="float32")  # samples are drawn in it, so they are scored in it
        began = time.perf_counter()
        figures = report(reference, policy, test[:256], cfg32, tokenizer)
        figures |= report_on_samples(
            reference, policy, test_prompts[:32], longest, cfg32, tokenizer)
        print(f"The report took {time.perf_counter() - began:.1f} s.")
        run.write(**{f"report/{name}": value for name, value in figures.items()})


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # python train.py | head ends quietly
    warnings.simplefilter("ignore")  # what is wrong with a file is said in one line
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 loses no report
    try:
        main()  # called from Python, it shows where an error arises
    except KeyboardInterrupt:
        print("\nstopped; --resume continues from the last state", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror.lower()}" if error.filename else error)
    except (MemoryError, OverflowError, RuntimeError, ValueError) as error:
        fail(str(error) or "out of memory")
