# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""From text to batches: tokenizers, padding, pairs from a file. Then the built-in toy task.

In the toy task a prompt names a genre in one of 25 phrasings. A completion is a review of one to
three adjectives. Its true reward is the sum of the rewards of its words in that genre:

    "Last night we saw a thriller:" " tense clever superb"    2 + 2 + 2 = 6

There are 12 + 144 + 1,728 = 1,884 reviews per prompt. They can all be listed, so expectations,
the optimal policy and KL divergences from it are exact. Outcome 1,885 is all malformed text.
"""
import itertools
import json
import math
import time
from collections import Counter, namedtuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F


# Examples. All texts are lists of ids. Completions end with EOS, unless a sample was cut off.
Row = namedtuple("Row", ("prompt", "completion"))
Pair = namedtuple("Pair", ("prompt", "chosen", "rejected"))
# A ScoredPair adds log π_ref(y|x) of both completions, in nats. Because the reference is frozen,
# they are computed once, before training, and travel with the pair.
ScoredPair = namedtuple("ScoredPair", (*Pair._fields, "ref_chosen_logp", "ref_rejected_logp"))


def length(example):
    """Tokens in the longest row of an example: the prompt and its longest completion."""
    if isinstance(example, Row):
        return len(example.prompt) + len(example.completion)
    return len(example.prompt) + max(len(example.chosen), len(example.rejected))


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
    """Text to ids: a Row. Prompt and completion are encoded separately, because otherwise one token
    could span both."""
    return Row(tokenizer.encode_ordinary(prompt), encode_completion(tokenizer, completion))


def encode_completion(tokenizer, text):
    """Text to ids, with EOS at the end. The text "<|endoftext|>" does not become EOS."""
    return tokenizer.encode_ordinary(text) + [tokenizer.eot_token]


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


KEYS = ("prompt", "chosen", "rejected")  # of a record; other fields are not used
CHARACTERS = 64  # read per token of block_size; this bounds the time that a very long text takes


def progress(items, what):
    """Yield the items. About every 10 seconds, print how many are done."""
    printed = time.perf_counter()
    for done, item in enumerate(items):
        if time.perf_counter() - printed > 10:
            print(f"{done:,} {what}", flush=True)
            printed = time.perf_counter()
        yield item


def read_jsonl(path):
    """Yield the record of each line that is not blank: a dict with strings prompt, chosen, rejected
    and perhaps other fields. Raises OSError, or ValueError "path:line: what is wrong"."""
    with open(path, "rb") as file:
        for number, line in enumerate(progress(file, f"lines of {path} read"), 1):
            line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark of UTF-8
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
                found = {key: type(value).__name__ for key, value in record.items()}
            except (AttributeError, ValueError, RecursionError) as error:  # it is no JSON object
                record, found = {}, f"{line[:60]!r} ({error})"
            if not all(isinstance(record.get(key), str) for key in KEYS):
                raise ValueError(
                    f"{path}:{number}: expected strings prompt, chosen and rejected, got "
                    f"{found!s:.200}; the README shows how to convert other formats")
            yield record


def encode_pair(texts, tokenizer, block_size):
    """Three texts to (Pair of int32 arrays, tokens of its longest completion, whether the prompt
    lost its first tokens, because it was too long)."""
    limit = CHARACTERS * block_size
    prompt, chosen = encode(tokenizer, texts[0][-limit:], texts[1][:limit])
    rejected = encode_completion(tokenizer, texts[2][:limit])
    longest = max(len(chosen), len(rejected))
    lost = len(texts[0]) > limit or len(prompt) + longest > block_size
    parts = (prompt[longest - block_size:], chosen, rejected)  # the last tokens that leave room
    return Pair(*(np.array(ids, np.int32) for ids in parts)), longest, lost


def encode_pairs(records, tokenizer, block_size, model_limit=None):
    """Encode the records of read_jsonl: [Pair], and {what happened: number of pairs}.

    A pair is dropped if a text is blank, if its completions are identical, or if a completion with
    its EOS is longer than half of block_size. Then the count says which block_size the long pairs
    need, and model_limit, the largest one that the model of --init allows.
    """
    pairs, counts, unused, needed, or_more = [], Counter(), set(), [], ""
    for record in records:
        texts = [record[key] for key in KEYS]
        unused |= set(record) - set(KEYS)
        counts["in the file"] += 1
        counts["unused"] += len(record) > len(KEYS)
        if not all(text.strip() for text in texts):
            counts["dropped: a text is blank"] += 1
        elif texts[1] == texts[2]:
            counts["dropped: the completions are identical"] += 1
        else:
            pair, longest, lost = encode_pair(texts, tokenizer, block_size)
            if 2 * longest <= block_size:
                pairs.append(pair)
                counts["with a prompt that lost its first tokens"] += lost
            else:
                needed.append(2 * longest)
                if max(len(texts[1]), len(texts[2])) > CHARACTERS * block_size:
                    or_more = " or more"  # because encode_pair has cut this text
    if needed:
        known = f"; the model of --init allows {model_limit}" if model_limit else ""
        counts[f"dropped: a completion over half of --block_size {block_size}; they need "
               f"--block_size {min(needed)} to {max(needed)}{or_more}{known}"] = len(needed)
    names = ", ".join(sorted(unused))
    counts[f"with fields that are not used: {names:.200}"] = counts.pop("unused", 0)
    return pairs, {text: n for text, n in counts.items() if n}


def split_pairs(pairs, fraction, block_size, seed):
    """Hold out a fraction of the prompts, with all of their pairs: (training, held-out pairs).

    With two or more prompts, at least one is held out and one is not, unless fraction is 0. Prompts
    that agree in their last block_size // 2 tokens count as one, because a cut can make them equal.
    Held-out pairs come in random order, because only the first ones are evaluated.
    """
    ends = [pair.prompt[-(block_size // 2):].tobytes() for pair in pairs]
    distinct = list(dict.fromkeys(ends))
    n = max(0, min(len(distinct) - 1, math.ceil(fraction * len(distinct))))
    rng = np.random.default_rng(seed)
    held_out = {distinct[i] for i in rng.permutation(len(distinct))[:n]}
    training_pairs = [pair for pair, end in zip(pairs, ends) if end not in held_out]
    return training_pairs, [pairs[i] for i in rng.permutation(len(pairs)) if ends[i] in held_out]


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


def toy_prompts():
    """All prompts: (80 to train on, 20 held out). Held-out prompts combine opening i with verb i.
    Training prompts never do."""
    every = [(i == j, f"{opening} {verb} {genre}:") for i, opening in enumerate(OPENINGS)
             for j, verb in enumerate(VERBS) for genre in GENRES]
    return [x for held_out, x in every if not held_out], [x for held_out, x in every if held_out]


def genre_of(prompt):
    return prompt.rstrip(":").split()[-1]


def toy_reviews(prompts, n, rng):
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
    # If the reference gives one outcome all its probability, it samples no such pair.
    return {name: total / weight if weight else math.nan for name, total in sums.items()}
