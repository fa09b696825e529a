"""data.py: the toy world, its exact figures, the tokenizer, masks and batches."""
import collections
import itertools
import math

import numpy as np
import pytest
import tiktoken
import torch

import data

THRILLER, COMEDY = "Last night we saw a thriller:", "Last night we saw a comedy:"


@pytest.fixture(scope="module")
def tokenizer():
    return data.toy_tokenizer()


def test_the_world_has_1884_reviews_a_prompt():
    assert len(data.REVIEWS) == len(set(data.REVIEWS)) == 12 + 144 + 1728 == 1884


def test_reward_is_the_worth_of_the_words_in_the_genre():
    assert data.reward(THRILLER, " tense clever superb") == 6
    assert data.reward(COMEDY, " tense clever superb") == 2
    rewards = data.outcome_rewards([THRILLER, COMEDY])
    assert rewards.shape == (2, 1885) and rewards.dtype == torch.float64
    assert rewards[0, data.REVIEWS.index(" tense clever superb")] == 6
    assert rewards[:, :-1].min() == -6 > data.MALFORMED == rewards[0, -1]


@pytest.mark.parametrize("text", ["", " ", " great", " tense tense tense tense", "tense", " tense  dull",
                                  " tense dull ", " Tense", " tense.", " tense…", " tense\n", " tensedull"])
def test_malformed_text_is_worth_less_than_the_worst_review(text):
    assert data.reward(THRILLER, text) == -7


def test_phrasings_are_held_out_whole():
    train, held_out = data.prompts()
    assert len(set(train)) == 80 and len(set(held_out)) == 20 and not set(train) & set(held_out)
    phrasing = lambda prompts: {p.rsplit(" ", 1)[0] for p in prompts}
    assert not phrasing(train) & phrasing(held_out)
    for part in data.OPENINGS + data.VERBS + data.GENRES:
        assert any(part in p for p in train) and any(part in p for p in held_out)


def test_the_corpus_has_the_frequencies_it_claims():
    reviews = data.corpus([THRILLER], 30_000, np.random.default_rng(0))
    lengths = collections.Counter(len(y.split()) for _, y in reviews)
    assert [lengths[n] / 30_000 for n in (1, 2, 3)] == pytest.approx(data.LENGTHS, abs=0.01)
    words = collections.Counter(word for _, y in reviews for word in y.split())
    assert words["tense"] / words["funny"] == pytest.approx(3, rel=0.08)
    assert all(data.reward(x, y) > data.MALFORMED for x, y in reviews)
    again = data.corpus([THRILLER], 30_000, np.random.default_rng(0))
    assert reviews == again != data.corpus([THRILLER], 30_000, np.random.default_rng(1))


def test_the_labeller_is_bradley_terry():
    """Eq. 1: the first is preferred with probability σ(r_1 - r_2); a tie is a coin."""
    rng = np.random.default_rng(0)
    for gap in (-2.0, 0.0, 1.0, 4.0):
        wins = data.prefers_first(np.full(40_000, gap + 3), np.full(40_000, 3), rng)
        assert wins.mean() == pytest.approx(1 / (1 + math.exp(-gap)), abs=0.01)


def random_policies(seed, prompts=(THRILLER, COMEDY)):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(len(prompts), 1885, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_exact_figures_agree_with_a_million_samples():
    p, ref, rewards = random_policies(0), random_policies(1), data.outcome_rewards([THRILLER, COMEDY])
    exact = data.exact_figures(p, ref, rewards)
    generator = torch.Generator().manual_seed(2)
    y = torch.multinomial(p.exp(), 500_000, replacement=True, generator=generator)
    other = torch.multinomial(ref.exp(), 500_000, replacement=True, generator=generator)
    r, r_other = rewards.gather(1, y), rewards.gather(1, other)
    sampled = {"reward": r.mean(), "kl": (p - ref).gather(1, y).mean(), "valid": (y < 1884).double().mean(),
               "win_rate": (r > r_other).double().mean() + (r == r_other).double().mean() / 2}
    assert exact == pytest.approx({k: v.item() for k, v in sampled.items()}, abs=0.02)
    same = data.exact_figures(ref, ref, rewards)
    assert same["kl"] == 0 and same["win_rate"] == pytest.approx(0.5, abs=1e-12)


def test_exact_accuracy_agrees_with_labelled_samples():
    """Identical pairs are dropped; scores that know nothing foretell half; the truth is the best."""
    ref, rewards = random_policies(1), data.outcome_rewards([THRILLER, COMEDY])
    generator = torch.Generator().manual_seed(2)
    for scores in (random_policies(0), rewards, rewards + random_policies(3)):
        y = torch.multinomial(ref.exp(), 1_000_000, replacement=True, generator=generator)
        first, second = y.view(2, 500_000, 2).unbind(-1)
        wins = data.prefers_first(rewards.gather(1, first), rewards.gather(1, second), np.random.default_rng(0))
        foretold = ((scores.gather(1, first) - scores.gather(1, second)).sign() + 1) / 2
        right = torch.where(torch.from_numpy(wins), foretold, 1 - foretold)[first != second].mean().item()
        accuracy = data.exact_accuracy(scores, ref, rewards)
        assert accuracy == pytest.approx(right, abs=0.003)
        assert accuracy <= data.exact_accuracy(rewards, ref, rewards)
    assert data.exact_accuracy(torch.zeros(2, 1885), ref, rewards) == pytest.approx(0.5, abs=1e-12)


def test_any_text_encodes_and_words_of_the_world_are_single_tokens(tokenizer):
    for text in ("Héllo wörld\n\n42", "a  sawdust I", "日本語 🙂", "<|endoftext|>", " " * 7, "", "\x00\r\t"):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    for word in data.WORTH:
        assert len(tokenizer.encode_ordinary(" " + word)) == 1
    assert len(tokenizer.encode_ordinary(THRILLER)) == 7
    ids = [tuple(tokenizer.encode_ordinary(y)) for y in data.REVIEWS]
    assert len(set(ids)) == 1884 and max(map(len, ids)) == data.MAX_NEW_TOKENS - 1


def test_completion_is_encoded_apart_and_ends_in_one_eos(tokenizer):
    """A merge over the border, "is 4" + "2", would leave an empty completion."""
    merging = tiktoken.Encoding("merging", pat_str=r"[\s\S]+", special_tokens={"<|endoftext|>": 257},
                                mergeable_ranks={bytes([i]): i for i in range(256)} | {b"42": 256})
    assert merging.encode_ordinary("is 42") == list(b"is ") + [256]
    assert data.encode(merging, "is 4", "2") == (list(b"is 4"), [50, 257])
    prompt, completion = data.encode(tokenizer, THRILLER, " tense superb")
    eos = tokenizer.eot_token
    assert completion.count(eos) == 1 and completion[-1] == eos and eos not in prompt


def test_text_that_spells_the_special_token_stays_text(tokenizer):
    prompt, completion = data.encode(tokenizer, "<|endoftext|>", "<|endoftext|>")
    assert tokenizer.eot_token not in prompt + completion[:-1]


def test_decode_marks_a_completion_that_never_ended(tokenizer):
    _, completion = data.encode(tokenizer, THRILLER, " tense dull")
    assert data.decode(tokenizer, completion) == " tense dull"
    assert data.decode(tokenizer, completion[:-1]) == " tense dull…"
    assert data.reward(THRILLER, data.decode(tokenizer, completion[:-1])) == data.MALFORMED


def test_collate_draws_what_its_docstring_draws(tokenizer):
    rows = [data.encode(tokenizer, THRILLER, " tense superb"), data.encode(tokenizer, THRILLER, " dull dull dull")]
    tokens, mask = data.collate(rows)
    scored = tokenizer.decode(tokens[0][mask[0]].tolist())
    assert scored == " tense superb<|endoftext|>"
    assert mask.int().tolist() == [[0] * 7 + [1] * 3 + [0], [0] * 7 + [1] * 4]
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool and tokens.shape == mask.shape == (2, 11)


def test_the_mask_comes_from_lengths_and_not_from_ids():
    """Token 0 is padding here, and it may stand in a prompt or a completion all the same."""
    tokens, mask = data.collate([([0, 0], [0, 5, 0]), ([1], [2])])
    assert tokens.tolist() == [[0, 0, 0, 5, 0], [1, 2, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("n, batch_size", [(103, 10), (5, 8), (40, 10), (1, 1)])
def test_an_epoch_has_every_example_once_in_batches_of_similar_length(n, batch_size):
    lengths = np.random.default_rng(0).integers(1, 200, n)
    count = math.ceil(n / batch_size)
    batches = data.batches(lengths, batch_size, seed=0)
    first, second = (list(itertools.islice(batches, count)) for _ in range(2))
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(n))
        eighths = sorted((lengths[b] // 8).tolist() for b in epoch)
        assert all(max(a) <= min(b) or min(a) >= max(b) for a, b in itertools.combinations(eighths, 2))
    if n > 10:
        assert [b.tolist() for b in first] != [b.tolist() for b in second]
    again = list(itertools.islice(data.batches(lengths, batch_size, seed=0), count))
    assert [b.tolist() for b in again] == [b.tolist() for b in first]


def test_rows_of_like_length_meet_at_random():
    """In the toy world all rows share an eighth, so that batches are plain shuffles."""
    seen = np.concatenate(list(itertools.islice(data.batches(np.full(1000, 11), 100, seed=0), 10)))
    assert abs(np.corrcoef(seen, np.arange(1000))[0, 1]) < 0.1
    assert len(set(seen[:100] // 100)) == 10
