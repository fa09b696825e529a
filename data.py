# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""From text to batches: tokenizers, padding, pairs from a file. Then the built-in toy task.

In the toy task a prompt names a genre in one of 25 phrasings. A completion is a review of one to
three adjectives. Its true reward is the sum of the rewards of its words in that genre:

    "Last night we saw a thriller:" " tense clever superb"    2 + 2 + 2 = 6

There are 12 + 144 + 1,728 = 1,884 reviews per prompt. They can all be listed, so expectations,
the optimal policy and KL divergences from it are exact. Outcome 1,885 is all malformed text.
"""
import hashlib
import itertools
import json
import math
import time
import zlib
from collections import Counter, namedtuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F


# Examples. All fields are token ids. Completions end with EOS, unless a sample was cut off.
Row = namedtuple("Row", ("prompt", "completion"))
Pair = namedtuple("Pair", ("prompt", "chosen", "rejected"))
# A ScoredPair adds log π_ref(y|x) of both completions, in nats.
ScoredPair = namedtuple("ScoredPair", (*Pair._fields, "ref_chosen_logp", "ref_rejected_logp"))


def length(example):
    """Tokens in the longest row of an example: the prompt and the longest completion."""
    return len(example.prompt) + max(map(len, example[1:3]))  # completion, or chosen and rejected


def get_tokenizer(name):
    """The tokenizer "toy", or one of tiktoken's, which is downloaded when first used."""
    if name == "toy":
        return toy_tokenizer()
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"unknown tokenizer {name!r}; expected toy or one of tiktoken's")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):
        raise ValueError(f"the {name} vocabulary is not on this disk and could not be downloaded; "
                         "without --init, --tokenizer toy needs no download") from None


def encode(tokenizer, prompt, completion):
    """Text to ids: a Row. EOS ends the completion. Prompt and completion are encoded separately.
    Otherwise one token could span both."""
    to_ids = tokenizer.encode_ordinary  # it does not turn the text "<|endoftext|>" into EOS
    return Row(to_ids(prompt), to_ids(completion) + [tokenizer.eot_token])


def decode(tokenizer, completion):
    """Ids of a completion to text. "…" marks a completion without EOS."""
    if completion[-1:] == [tokenizer.eot_token]:
        return tokenizer.decode(completion[:-1])
    return tokenizer.decode(completion) + "…"


def collate(rows, device="cpu"):
    """Rows to tokens (B, T), int64, and mask (B, T), True on each completion and its EOS:

        tokens  Last night we saw a thriller : tense superb EOS pad
        mask     0     0   0   0  0    0     0   1     1     1   0

    Padding comes last, so no attention mask is needed: attention is causal.
    """
    T = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = np.zeros((len(rows), T), np.int64)
    mask = np.zeros((len(rows), T), bool)
    for i, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[i, :start] = prompt
        tokens[i, start:end] = completion
        mask[i, start:end] = True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def batches(examples, batch_size, seed):
    """Yield lists of examples, endlessly. Each epoch has every example once, in a new order.

    Examples of similar length share a batch, so there is little padding. Batch sizes differ by at
    most one, so all examples of an epoch count about equally.
    """
    rng = np.random.default_rng(seed)
    buckets = np.array([length(example) // 8 for example in examples])
    n_batches = math.ceil(len(examples) / batch_size)
    while True:
        order = rng.permutation(len(examples))
        order = order[np.argsort(buckets[order], kind="stable")]  # random within each bucket
        epoch = np.array_split(order, n_batches)
        for i in rng.permutation(n_batches):
            yield [examples[k] for k in epoch[i]]


KEYS = ("prompt", "chosen", "rejected")
OTHER_FORMATS = {  # first bytes of other files, and what to do
    b"[": "a JSON array; write one object per line, as the README shows",
    b"\x1f\x8b": "compressed by gzip; unpack it first", b"PK": "a zip archive; unpack it first",
    b"\xff\xfe": "UTF-16; save it as UTF-8", b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"PAR1": "a Parquet file; write one JSON object per line, as the README shows",
    b"version https://git-lfs": "a Git LFS pointer; run git lfs pull to get the file"}


def parse_line(line):
    """[prompt, chosen, rejected] from one line of a file, as bytes. Raises ValueError."""
    for start, description in OTHER_FORMATS.items():
        if line.lstrip().startswith(start):
            raise ValueError(f"this is {description}")
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError("expected one JSON object per line, as the README shows, but got "
                         f"{line[:30]!r} ({error!s:.60})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {record!r:.60}")
    for key in KEYS:
        if not isinstance(record.get(key), str):
            found = f"{record[key]!r:.60}" if key in record else f"not in {list(record)!r:.100}"
            raise ValueError(f'expected strings for "prompt", "chosen" and "rejected", but "{key}" '
                             f"is {found}; the README shows how to convert other formats")
    return [record[key] for key in KEYS]


def progress(items, what):
    """Yield the items. About every 10 seconds, print how many are done."""
    printed = time.perf_counter()
    for done, item in enumerate(items):
        if time.perf_counter() - printed > 10:
            print(f"{done:,} {what}", flush=True)
            printed = time.perf_counter()
        yield item


def read_jsonl(path):
    """Yield [prompt, chosen, rejected] for each line that is not blank. Raises OSError, or
    ValueError "path:line: what is wrong"."""
    with open(path, "rb") as file:
        for number, line in enumerate(progress(file, f"lines of {path} read"), 1):
            line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark of UTF-8
            if line.strip():
                try:
                    texts = parse_line(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
                yield texts


def encode_pairs(texts, tokenizer, block_size):
    """Encode an iterable of [prompt, chosen, rejected]. Returns [Pair of int32 arrays],
    {what happened: number of pairs} and a checksum of the texts.

    A pair is dropped if a text is blank, if its completions are identical, or if one of them is
    longer than half of block_size. A prompt that is too long loses its first tokens.
    """
    pairs, needed, seen, checksum, counts = [], [], set(), 0, Counter()
    limit = 64 * block_size  # characters. It bounds the time that a very long text takes.
    for x, y_w, y_l in texts:
        checksum = zlib.crc32(json.dumps([x, y_w, y_l]).encode(), checksum)
        counts["in the file"] += 1
        if not (x.strip() and y_w.strip() and y_l.strip()):
            counts["dropped: a text is blank"] += 1
            continue
        prompt, chosen = encode(tokenizer, x[-limit:], y_w[:limit])
        rejected = encode(tokenizer, "", y_l[:limit]).completion
        longest = max(len(chosen), len(rejected))
        # The block_size that this pair needs; an estimate if a text was cut at the limit.
        needed.append(2 * longest * max(1, len(y_w) / limit, len(y_l) / limit))
        if needed[-1] > block_size:
            continue
        if chosen == rejected:
            counts["dropped: the completions are identical"] += 1
            continue
        parts = (prompt[longest - block_size:], chosen, rejected)
        pairs.append(Pair(*(np.array(ids, np.int32) for ids in parts)))
        cut = len(x) > limit or len(prompt) + longest > block_size
        counts["with a prompt that lost its first tokens"] += cut
        counts["repeat an earlier pair"] += hash((x, y_w, y_l)) in seen
        counts["contradict an earlier pair"] += hash((x, y_l, y_w)) in seen
        seen.add(hash((x, y_w, y_l)))  # a hash needs less memory than the texts
    most = np.quantile(needed or [0], 0.95, method="higher")
    counts[f"dropped: a completion over half of --block_size {block_size}; 95% of the pairs need "
           f"at most {most:.0f}"] = sum(size > block_size for size in needed)
    return pairs, dict(+counts), checksum  # + removes zeros


def split_pairs(pairs, fraction, block_size, seed):
    """Hold out a fraction of the prompts, with all of their pairs: (training, held-out pairs).

    A hash of the prompt and the seed orders them. With two or more prompts, at least one is held
    out and one is not, unless fraction is 0. Prompts with the same last block_size // 2 tokens
    count as one, since a cut may keep only these.
    """
    def key(pair):
        end = pair.prompt[-(block_size // 2):].tolist()
        return hashlib.sha256(f"{seed} {end}".encode()).digest()

    groups = [list(group) for _, group in itertools.groupby(sorted(pairs, key=key), key)]
    n = round(fraction * len(groups)) or math.ceil(fraction)  # at least 1, unless fraction is 0
    n = max(0, min(n, len(groups) - 1))
    return list(itertools.chain(*groups[n:])), list(itertools.chain(*groups[:n]))


# The toy task

GENRES = ("comedy", "thriller", "romance", "documentary")
WORD_REWARDS = {  # in each of the genres above
    "superb": (2, 2, 2, 2), "clever": (1, 2, 0, 1), "charming": (1, -1, 2, 0),
    "funny": (2, -1, 1, 0), "tense": (-1, 2, -1, 0), "tender": (0, -1, 2, 1),
    "honest": (0, 0, 1, 2), "loud": (0, 1, -1, -2), "slow": (-1, -2, 0, 1),
    "silly": (1, -2, -1, -1), "dull": (-1, -1, -1, -1), "awful": (-2, -2, -2, -2)}
MALFORMED = -7  # reward of malformed text; the lowest of a review is -6, " awful awful awful"
MAX_NEW_TOKENS = 4  # three words and EOS
TYPICAL = {  # In the corpus these words are three times as frequent as other words.
    "comedy": ("funny", "silly", "dull"), "thriller": ("tense", "loud", "slow"),
    "romance": ("tender", "silly", "slow"), "documentary": ("honest", "slow", "dull")}
LENGTHS = (0.2, 0.3, 0.5)  # fractions of the corpus with one, two and three words
OPENINGS = ("Last night", "On Friday", "After dinner", "With friends", "At home")
VERBS = ("we saw a", "I watched a", "they showed a", "she chose a", "you missed a")
REVIEWS = ["".join(" " + word for word in words)
           for n in (1, 2, 3) for words in itertools.product(WORD_REWARDS, repeat=n)]
WELL_FORMED = frozenset(REVIEWS)
FIGURES = {  # keys of exact_figures, with their labels in the report
    "objective": "objective E[r] - β KL", "reward": "E[r]", "kl": "KL(π‖π_ref), nats",
    "valid": "P(well-formed)", "win_rate": "win rate against SFT",
    "accuracy": "preference accuracy", "margin": "implicit reward margin", "loss": "DPO loss, nats",
    "chosen_change": "Δ log π(chosen), nats", "rejected_change": "Δ log π(rejected), nats"}


def prompts():
    """All prompts: (80 to train on, 20 held out). Held-out prompts combine opening i with verb i.
    Training prompts never do."""
    every = [(i == j, f"{opening} {verb} {genre}:") for i, opening in enumerate(OPENINGS)
             for j, verb in enumerate(VERBS) for genre in GENRES]
    return [x for held_out, x in every if not held_out], [x for held_out, x in every if held_out]


def genre_of(prompt):
    return prompt.rstrip(":").split()[-1]


def corpus(prompts, n, rng):
    """n reviews to fine-tune on, [(prompt, completion)]: good and bad, some words more frequent."""
    words_of = {}
    for genre in GENRES:
        weights = np.array([3.0 if word in TYPICAL[genre] else 1.0 for word in WORD_REWARDS])
        words_of[genre] = rng.choice(list(WORD_REWARDS), (n, 3), p=weights / weights.sum())
    drawn = [prompts[k] for k in rng.integers(len(prompts), size=n)]
    lengths = rng.choice((1, 2, 3), n, p=LENGTHS)
    return [(prompt, "".join(" " + word for word in words_of[genre_of(prompt)][i, :lengths[i]]))
            for i, prompt in enumerate(drawn)]


def reward(prompt, completion):
    """The true reward r(x, y): the sum of the words' rewards in the prompt's genre, or MALFORMED.
    Worked value: " tense clever superb" has reward 6 for a thriller and 2 for a comedy."""
    if completion not in WELL_FORMED:
        return MALFORMED
    column = GENRES.index(genre_of(prompt))
    return sum(WORD_REWARDS[word][column] for word in completion.split())


def prefers_first(first_rewards, second_rewards, rng):
    """A simulated annotator (Bradley-Terry, Eq. 1): (n,), True with probability σ(r_1 - r_2)."""
    gap = np.asarray(first_rewards) - np.asarray(second_rewards)
    return rng.random(gap.shape) < 1 / (1 + np.exp(-gap))


def outcome_rewards(prompts):
    """True rewards of the 1,884 reviews and, last, of malformed text: (X, 1885), float64."""
    return torch.tensor([[reward(x, y) for y in REVIEWS] + [MALFORMED] for x in prompts]).double()


def exact_figures(logps, ref_logps, rewards, beta):
    """Exact figures of a policy, means over X prompts, {key of FIGURES: number}.

    logps, ref_logps and rewards are (X, K), for all K outcomes. kl is a lower bound of the KL
    between texts, because all malformed text is one outcome.
    """
    p = logps.exp()
    mean_reward = (p * rewards).sum(-1).mean().item()
    kl = (p * (logps - ref_logps)).sum(-1).mean().item()
    wins = 0  # P(r(y) > r(y')) for y ~ π and y' ~ π_ref; a tie counts ½
    for p_x, ref_x, r in zip(p.float(), ref_logps.exp().float(), rewards.float()):
        wins += (p_x @ ((r[:, None] - r).sign() + 1) @ ref_x).item() / 2
    return {"objective": mean_reward - beta * kl, "reward": mean_reward, "kl": kl,  # Eq. 3
            "valid": p[:, :-1].sum(-1).mean().item(), "win_rate": wins / len(p),
            **pair_figures(logps, ref_logps, rewards, beta)}


def pair_figures(logps, ref_logps, rewards, beta):
    """What DPO without label smoothing would log over infinitely many pairs of two different
    outcomes, sampled from π_ref, with Bradley-Terry labels. All arguments (X, K)."""
    sums = Counter()
    changes = logps - ref_logps
    for ref, change, r in zip(ref_logps.exp().float(), changes.float(), rewards.float()):
        # Entry (i, j) is the pair with outcome i chosen and outcome j rejected.
        weights = (ref[:, None] * ref * (r[:, None] - r).sigmoid()).fill_diagonal_(0)
        margins = beta * (change[:, None] - change)
        sums["weight"] += weights.sum().item()
        sums["accuracy"] += (weights * (margins.sign() + 1)).sum().item() / 2
        sums["margin"] += (weights * margins).sum().item()
        sums["loss"] -= (weights * F.logsigmoid(margins)).sum().item()
        sums["chosen_change"] += (weights.sum(1) @ change).item()
        sums["rejected_change"] += (weights.sum(0) @ change).item()
    weight = sums.pop("weight")
    return {name: total / weight for name, total in sums.items()}


def toy_tokenizer():
    """A tiktoken.Encoding that needs no download. Ids 0 to 255 are the bytes, so it encodes any
    text. The next ids are the words of the toy task. The last id is EOS, its eot_token."""
    text = " ".join(OPENINGS + VERBS + GENRES + tuple(WORD_REWARDS)).split()
    words = sorted({" " + word for word in text} | {opening.split()[0] for opening in OPENINGS})
    vocabulary = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    pattern = r" ?\p{L}+|[^\p{L}]"  # a word with the space before it, or one other character
    ranks = {token: i for i, token in enumerate(vocabulary)}
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(vocabulary)})
