# SPDX-License-Identifier: MIT
"""Text and pairs: tokenizers, the toy world and its exact figures, pairs from a file, batches.

In the toy world a prompt names a genre in one of 25 phrasings, a completion is a review of one to
three adjectives, and its true reward is the sum of their worth in that genre:

    "Last night we saw a thriller:" " tense clever superb"    2 + 2 + 2 = 6

That makes 12 + 144 + 1,728 = 1,884 reviews a prompt, few enough to list: expectations, divergences
and the optimum are sums, not estimates. All malformed text together is outcome number 1,885.
"""
import collections
import itertools
import json
import math

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

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
    "comedy": ("funny", "silly", "dull"), "thriller": ("tense", "loud", "slow"),
    "romance": ("tender", "silly", "slow"), "documentary": ("honest", "slow", "dull")}
LENGTHS = (0.2, 0.3, 0.5)  # fractions of the corpus that have one, two and three words
OPENINGS = ("Last night", "On Friday", "After dinner", "With friends", "At home")
VERBS = ("we saw a", "I watched a", "they showed a", "she chose a", "you missed a")

REVIEWS = ["".join(" " + word for word in words)
           for n in (1, 2, 3) for words in itertools.product(WORTH, repeat=n)]
WELL_FORMED = frozenset(REVIEWS)
FIGURES = {  # of exact_figures, as a report prints them
    "reward": "E[r]", "kl": "KL(π‖π_ref), nats", "objective": "E[r] - β KL(π‖π_ref)",
    "valid": "P(well-formed)", "win_rate": "P(worth more than π_ref's)",
    "accuracy": "labels predicted", "margin": "implicit reward margin", "loss": "DPO loss, nats",
    "chosen_change": "Δ log π(chosen), nats", "rejected_change": "Δ log π(rejected), nats"}


def prompts():
    """All prompts, (80 to train on, 20 held out). Training sees the opening and the verb of each
    held-out phrasing, but never together."""
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
    if completion not in WELL_FORMED:
        return MALFORMED
    g = GENRES.index(genre(prompt))
    return sum(WORTH[word][g] for word in completion.split())


def prefers_first(first_rewards, second_rewards, rng):
    """A noisy human (Bradley-Terry, Eq. 1): True with probability σ(r_1 - r_2). Arrays (n,)."""
    gap = np.asarray(first_rewards) - np.asarray(second_rewards)
    return rng.random(gap.shape) < 1 / (1 + np.exp(-gap))


def outcome_rewards(prompts):
    """(X, 1885) float64: true rewards of the 1,884 reviews and, last, of malformed text."""
    return torch.tensor([[reward(x, y) for y in REVIEWS] + [MALFORMED] for x in prompts]).double()


def exact_figures(logps, ref_logps, rewards, beta):
    """What a policy is worth, from log-probabilities and rewards of all outcomes, (X, K) each.

    Means over y ~ π: reward, kl (a lower bound of that between texts, as malformed text is one
    outcome), objective (Eq. 3), valid, win_rate against y' ~ π_ref (a tie counts ½). The rest are
    means over labelled pairs (Eq. 1) of two different outcomes y, y' ~ π_ref: loss is Eq. 7."""
    p, ref, changes = logps.exp(), ref_logps.exp(), logps - ref_logps
    reward, kl = (p * rewards).sum(-1).mean().item(), (p * changes).sum(-1).mean().item()
    wins = total = sums = 0
    for p_x, ref_x, change, r in zip(p.float(), ref.float(), changes.float(), rewards.float()):
        gaps = r[:, None] - r  # (K, K): row over column
        wins += p_x @ (gaps.sign() + 1) @ ref_x / 2 / len(p)
        weights = (ref_x[:, None] * ref_x * gaps.sigmoid()).fill_diagonal_(0)  # row is chosen
        margins = beta * (change[:, None] - change)
        chosen, rejected = weights.sum(1) @ change, weights.sum(0) @ change
        total += weights.sum()
        sums += torch.stack([(weights * (margins.sign() + 1)).sum() / 2, (weights * margins).sum(),
                             -(weights * F.logsigmoid(margins)).sum(), chosen, rejected])
    values = (reward, kl, reward - beta * kl, p[:, :-1].sum(-1).mean(), wins, *(sums / total))
    return {name: float(value) for name, value in zip(FIGURES, values)}


def toy_tokenizer():
    """A tiktoken.Encoding made offline: ids 0-255 are the bytes, so that any text encodes; then an
    id for each word of the toy world; then EOS, <|endoftext|>, the encoding's `eot_token`."""
    text = " ".join(OPENINGS + VERBS + GENRES + tuple(WORTH)).split()
    words = sorted({" " + word for word in text} | {opening.split()[0] for opening in OPENINGS})
    vocabulary = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    pattern = r" ?\p{L}+|[^\p{L}]"  # a word with the space before it, or one other character
    ranks = {token: i for i, token in enumerate(vocabulary)}
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(vocabulary)})


def get_tokenizer(name):
    """The tokenizer "toy", or one of tiktoken's, which are downloaded at first use."""
    try:
        return toy_tokenizer() if name == "toy" else tiktoken.get_encoding(name)
    except OSError:
        raise ValueError(f"the {name} vocabulary is not on this disk and could not be downloaded; "
                         "--tokenizer toy needs no download") from None


def encode(tokenizer, prompt, completion):
    """The ids of a prompt, and those of its completion with EOS: two lists. They are encoded apart,
    because a merge across their border would shorten the completion."""
    ids = tokenizer.encode_ordinary  # in which text that spells "<|endoftext|>" stays text
    return ids(prompt), ids(completion) + [tokenizer.eot_token]


def decode(tokenizer, completion):
    """The text of a completion's ids; "…" marks one that was cut off before its EOS."""
    if completion[-1:] == [tokenizer.eot_token]:
        return tokenizer.decode(completion[:-1])
    return tokenizer.decode(completion) + "…"


def read_jsonl(path):
    """[(prompt, chosen, rejected)] of a file with one JSON object of these three texts a line.
    Blank lines are skipped; the first bad one is a ValueError, "path:line: what is wrong"."""
    pairs = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    pair = json.loads(line.decode("utf-8-sig"))
                    pairs.append(tuple(pair[key] + "" for key in ("prompt", "chosen", "rejected")))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(f'{path}:{number}: expected {{"prompt": "…", "chosen": "…", '
                                 f'"rejected": "…"}}, got {error!r:.200}') from None
    return pairs


def split_pairs(texts, tokenizer, block_size, held_out, seed):
    """[(prompt, chosen, rejected)] in text -> the same in ids, (to train on, held out, counts).

    Dropped: pairs with an empty text, two identical completions, or one longer than half of
    block_size. A prompt that does not fit loses its first tokens. Repetitions and contradictions
    stay in. Each prompt is held out with probability held_out, with all of its pairs; prompts with
    the same last block_size // 2 tokens count as one, since a cut always leaves that many.
    """
    train, test, seen, counts = [], [], set(), collections.Counter()
    for x, y_w, y_l in texts:
        (prompt, chosen), (_, rejected) = (encode(tokenizer, x, y) for y in (y_w, y_l))
        room = block_size - max(len(chosen), len(rejected))
        if not all(text.strip() for text in (x, y_w, y_l)):
            counts["with an empty text, dropped"] += 1
        elif chosen == rejected:
            counts["with identical completions, dropped"] += 1
        elif room < block_size / 2:
            counts["with too long a completion, dropped"] += 1
        else:
            counts["with a prompt that was cut"] += len(prompt) > room
            counts["that repeat an earlier pair"] += (x, y_w, y_l) in seen
            counts["that contradict an earlier pair"] += (x, y_l, y_w) in seen
            seen.add((x, y_w, y_l))
            luck = np.random.default_rng([seed, *prompt[-(block_size // 2):]]).random()
            (test if luck < held_out else train).append((prompt[-room:], chosen, rejected))
    counts = {"to train on": len(train), "held out": len(test)} | counts
    if not train:
        raise ValueError(f"expected a pair to train on, got {counts}")
    return train, test, counts


def collate(examples, device="cpu"):
    """[(prompt ids, completion ids, …)], K completions each -> three (B, T) int64, padded with 0:

        tokens     Last night we saw a thriller : tense superb EOS : dull EOS pad
        positions   0    1    2   3  4    5     6   7     8     9  6   7    8   0
        segments    0    0    0   0  0    0     1   1     1     1  2   2    2   0

    A row is a prompt and its completions side by side. The prompt's last token stands before each
    completion, and not in segment 0, because it predicts the first token. A token attends to
    segment 0 and to its own segment; scored are all tokens of segments 1 to K but their first.
    """
    T = max(sum(map(len, example)) + len(example) - 2 for example in examples)
    batch = np.zeros((len(examples), 3, T), np.int64)
    for row, (prompt, *completions) in zip(batch, examples):
        last = end = len(prompt) - 1
        row[:2, :last] = prompt[:last], range(last)
        for k, y in enumerate(completions, 1):
            n = 1 + len(y)
            row[:, end:end + n] = prompt[last:] + y, range(last, last + n), [k] * n
            end += n
    return torch.from_numpy(batch).to(device).unbind(1)


def batches(lengths, batch_size, seed):
    """Arrays of example numbers, endlessly: each epoch holds every example once, in a new order.
    Batches hold examples of similar lengths (bucketed by length // 8), so that little is padding,
    and their sizes differ by one at most, so that no example of an epoch counts much more."""
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths)
    while True:
        order = rng.permutation(len(lengths))
        order = order[np.argsort(lengths[order] // 8, kind="stable")]
        epoch = np.array_split(order, math.ceil(len(order) / batch_size))
        for i in rng.permutation(len(epoch)):
            yield epoch[i]
