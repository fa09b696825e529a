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
import itertools

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

    >>> reward("Last night we saw a thriller:", " tense clever superb")
    6
    >>> reward("Last night we saw a comedy:", " tense clever superb")
    2
    """
    words = completion.split()
    if not 1 <= len(words) <= 3 or completion != "".join(" " + word for word in words):
        return MALFORMED
    if any(word not in WORTH for word in words):
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


def collate(rows, device="cpu"):
    """[(prompt ids, completion ids)] -> tokens (B, T) int64, mask (B, T) bool, padded on the right.

    The mask is made from the lengths, not from the ids, and is True on the completion and its EOS:

        tokens   Last  night  we  saw  a  thriller  :  tense  superb  EOS  pad
        mask      .      .     .   .   .     .      .    x      x      x    .
    """
    T = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = np.zeros((len(rows), T), np.int64)
    mask = np.zeros((len(rows), T), bool)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[i, :end] = prompt + completion
        mask[i, len(prompt):end] = True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


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
