# SPDX-License-Identifier: MIT
"""Text and pairs: a tokenizer, the toy world of three-word reviews, and batches.

The toy world is small enough to check every number exactly. A prompt names a genre in one of 25
phrasings, a completion is one to three adjectives and EOS, and the true reward is the sum of the
adjectives' worth in that genre:

    prompt       "Last night we saw a thriller:"
    completion   " tense clever superb"               2 + 2 + 2 = 6

That makes 12 + 144 + 1,728 = 1,884 completions a prompt, so expectations and divergences are sums
over all of them. Anything else a model writes is malformed and worth less than the worst review.
"""
import collections
import itertools
import json
import math

import numpy as np
import tiktoken
import torch

GENRES = ("comedy", "thriller", "romance", "documentary")
WORTH = {  # of each adjective in each of the genres above
    "superb": (2, 2, 2, 2),
    "clever": (1, 2, 0, 1),
    "charming": (1, -1, 2, 0),
    "funny": (2, -1, 1, 0),
    "tense": (-1, 2, -1, 0),
    "tender": (0, -1, 2, 1),
    "honest": (0, 0, 1, 2),
    "loud": (0, 1, -1, -2),
    "slow": (-1, -2, 0, 1),
    "silly": (1, -2, -1, -1),
    "dull": (-1, -1, -1, -1),
    "awful": (-2, -2, -2, -2),
}
MALFORMED = -7  # the worst review, " awful awful awful", is worth -6
MAX_NEW_TOKENS = 4  # three words and EOS
TYPICAL = {  # adjectives that people use three times as often as the others, good or bad
    "comedy": ("funny", "silly", "dull"),
    "thriller": ("tense", "loud", "slow"),
    "romance": ("tender", "silly", "slow"),
    "documentary": ("honest", "slow", "dull"),
}
LENGTHS = (0.2, 0.3, 0.5)  # share of the reviews that have one, two and three words
OPENINGS = ("Last night", "On Friday", "After dinner", "With friends", "At home")
VERBS = ("we saw a", "I watched a", "they showed a", "she chose a", "you missed a")

REVIEWS = ["".join(" " + word for word in words)
           for n in (1, 2, 3) for words in itertools.product(WORTH, repeat=n)]


def prompts():
    """All prompts, as (80 to train on, 20 held out): one phrasing in five is never trained on.

    Every opening and every verb occurs in training; the held-out combinations of the two do not.
    """
    train, held_out = [], []
    for i, opening in enumerate(OPENINGS):
        for j, verb in enumerate(VERBS):
            (held_out if i == j else train).extend(f"{opening} {verb} {g}:" for g in GENRES)
    return train, held_out


def genre(prompt):
    return prompt.rstrip(":").split()[-1]


def corpus(prompts, n, rng):
    """n reviews as people write them, [(prompt, completion)]: neither uniform nor good."""
    drawn = {}
    for g in GENRES:
        weights = np.array([3.0 if word in TYPICAL[g] else 1.0 for word in WORTH])
        drawn[g] = rng.choice(list(WORTH), (n, 3), p=weights / weights.sum())
    numbers, lengths = rng.integers(len(prompts), size=n), rng.choice((1, 2, 3), n, p=LENGTHS)
    return [(prompts[k], "".join(" " + word for word in drawn[genre(prompts[k])][i, :length]))
            for i, (k, length) in enumerate(zip(numbers, lengths))]


def reward(prompt, completion):
    """The true reward r(x, y): the sum of the words' worth in the prompt's genre, or MALFORMED.

    Worked value: " tense clever superb" is worth 6 of a thriller and 2 of a comedy.
    """
    words = completion.split()
    if completion not in REVIEWS:
        return MALFORMED
    return sum(WORTH[word][GENRES.index(genre(prompt))] for word in words)


def prefers_first(first_rewards, second_rewards, rng):
    """A noisy human (Bradley-Terry, Eq. 1): True with probability σ(r_1 - r_2). Arrays (n,)."""
    gap = np.asarray(first_rewards, float) - np.asarray(second_rewards, float)
    return rng.random(gap.shape) < 1 / (1 + np.exp(-gap))


def outcome_rewards(prompts):
    """(X, 1885) float64: the true reward of all that can happen, the 1,884 reviews and, last, the
    rest, which is malformed. With log-probabilities in the same layout every mean is exact."""
    return torch.tensor([[reward(x, y) for y in REVIEWS] + [MALFORMED] for x in prompts]).double()


def exact_figures(logps, ref_logps, rewards):
    """Means over the prompts of E[r], KL(π‖π_ref) in nats, the probability of well-formed reviews,
    and the win rate: the chance that y ~ π is worth more than y' ~ π_ref, where a tie counts ½.
    All malformed text is one outcome, so the KL is a lower bound of that between texts."""
    p, ref = logps.exp(), ref_logps.exp()
    wins = [p_x @ ((r[:, None] - r).sign() + 1) @ ref_x / 2
            for p_x, ref_x, r in zip(p, ref, rewards)]
    return {"reward": (p * rewards).sum(-1).mean().item(),
            "kl": (p * (logps - ref_logps)).sum(-1).mean().item(),
            "valid": p[:, :-1].sum(-1).mean().item(),
            "win_rate": torch.stack(wins).mean().item()}


def exact_accuracy(scores, ref_logps, rewards):
    """Share of the noisy labels on two different y ~ π_ref that scores (X, 1885) predict.

    With the true rewards as scores it is the Bayes accuracy: no scores can predict more."""
    right = total = 0.0
    for s, p, r in zip(scores, ref_logps.exp(), rewards):
        pair = (p[:, None] * p).fill_diagonal_(0)  # (1885, 1885), each pair in both orders
        right += (pair * ((s[:, None] - s).sign() + 1) * torch.sigmoid(r[:, None] - r)).sum().item()
        total += pair.sum().item()
    return right / total


def toy_tokenizer():
    """A tiktoken.Encoding made offline: ids 0-255 are the bytes, so that any text encodes; then an
    id for each word of the toy world; then EOS, <|endoftext|>, the encoding's `eot_token`."""
    text = " ".join(OPENINGS + VERBS + GENRES + tuple(WORTH)).split()
    words = sorted({" " + word for word in text} | {opening.split()[0] for opening in OPENINGS})
    vocabulary = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    return tiktoken.Encoding(
        "toy",
        pat_str=r" ?\p{L}+|[^\p{L}]",  # a word with the space before it, or one other character
        mergeable_ranks={token: i for i, token in enumerate(vocabulary)},
        special_tokens={"<|endoftext|>": len(vocabulary)},
    )


def get_tokenizer(name):
    """"toy", or one of tiktoken's, which are downloaded at first use."""
    try:
        return toy_tokenizer() if name == "toy" else tiktoken.get_encoding(name)
    except OSError:
        raise ValueError(f"the {name} vocabulary is not on this disk and could not be downloaded; "
                         "--tokenizer toy needs no download") from None


def encode(tokenizer, prompt, completion):
    """The ids of a prompt, and those of its completion with EOS: two lists.

    They are encoded apart, because a merge across their border would shorten the completion.
    Text that spells "<|endoftext|>" stays text.
    """
    return (tokenizer.encode_ordinary(prompt),
            tokenizer.encode_ordinary(completion) + [tokenizer.eot_token])


def decode(tokenizer, completion):
    """The text of a completion's ids; "…" marks one that was cut off before its EOS."""
    if completion[-1:] == [tokenizer.eot_token]:
        return tokenizer.decode(completion[:-1])
    return tokenizer.decode(completion) + "…"


def read_jsonl(path):
    """[(prompt, chosen, rejected)] of a file with one JSON object of these three texts a line.

    Raises ValueError, "path:line: what is wrong", at the first bad line. Skips blank lines.
    """
    pairs, keys = [], ("prompt", "chosen", "rejected")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                pair = json.loads(line.decode("utf-8-sig"))
                if not isinstance(pair, dict):
                    raise ValueError("expected a JSON object")
                for key in keys:
                    text = pair.get(key)
                    if not isinstance(text, str) or not text.strip() or "\0" in text:
                        raise ValueError(f"expected {key} to be text, not empty and without NUL")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            pairs.append(tuple(pair[key] for key in keys))
    if not pairs:
        raise ValueError(f"{path}: expected a pair, got an empty file")
    return pairs


def split_pairs(texts, tokenizer, block_size, held_out, seed):
    """[(prompt, chosen, rejected)], as texts -> as ids, (to train on, held out, counts).

    A share held_out of the prompts is held out, each with all of its pairs. A pair is dropped if an
    answer takes more than half of block_size, or if its answers are the same: that teaches nothing.
    Prompts lose their first tokens where the longer answer would not fit. Duplicates and
    contradictions are counted and kept: people repeat themselves and disagree.
    """
    pairs, seen, counts = [], set(), collections.Counter()
    for x, y_w, y_l in texts:
        (prompt, chosen), (_, rejected) = (encode(tokenizer, x, y) for y in (y_w, y_l))
        room = block_size - max(len(chosen), len(rejected))
        counts["identical, dropped"] += chosen == rejected
        counts["too long, dropped"] += room < block_size / 2 and chosen != rejected
        if chosen != rejected and room >= block_size / 2:
            counts["prompts cut"] += len(prompt) > room
            counts["duplicate"] += (x, y_w, y_l) in seen
            counts["contradictory"] += (x, y_l, y_w) in seen
            seen.add((x, y_w, y_l))
            pairs.append((x, (prompt[-room:], chosen, rejected)))
    prompts = sorted({x for x, _ in pairs})
    if len(prompts) < 2:
        raise ValueError(f"expected usable pairs of two prompts or more, got {len(prompts)}")
    order = np.random.default_rng(seed).permutation(len(prompts))
    count = min(math.ceil(held_out * len(prompts)), len(prompts) - 1)
    out = {prompts[i] for i in order[:count]}
    train, test = ([pair for x, pair in pairs if (x in out) == side] for side in (False, True))
    return train, test, {"to train on": len(train), "held out": len(test)} | counts


def collate(examples, device="cpu"):
    """[(prompt ids, answer ids, …)], K answers each -> four tensors (B, T) int64, padded with 0:

        tokens     Last night we saw a thriller : tense superb EOS dull EOS pad
        positions   0    1    2   3  4    5     6   7     8     9   7    8   0
        answers     0    0    0   0  0    0     0   1     1     1   2    2   0
        sources     0    0    0   0  0    0     0   6     7     8   6   10   0

    A row is a prompt and its answers side by side: answers says which a token is in, positions
    counts within the prompt and that answer. The tokens with answers > 0 are scored, EOS included,
    by the logits at their sources: the token before, or the prompt's last for an answer's first.
    """
    T = max(sum(map(len, example)) for example in examples)
    batch = np.zeros((len(examples), 4, T), np.int64)
    for row, (prompt, *completions) in zip(batch, examples):
        n = end = len(prompt)
        row[:2, :n] = prompt, range(n)
        for k, y in enumerate(completions, 1):
            start, end = end, end + len(y)
            row[:3, start:end] = y, range(n, n + len(y)), [k] * len(y)
            row[3, start:end] = [n - 1, *range(start, end - 1)]
    return torch.from_numpy(batch).to(device).unbind(1)


def batches(lengths, batch_size, seed):
    """Arrays of example numbers, for ever: each epoch holds every example once, in a new order.

    The examples of a batch have similar lengths (in eights of tokens), so that little is padding.
    """
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths)
    while True:
        order = rng.permutation(len(lengths))
        order = order[np.argsort(lengths[order] // 8, kind="stable")]
        epoch = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        for i in rng.permutation(len(epoch)):
            yield epoch[i]
