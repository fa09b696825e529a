"""data.py: the toy world, its exact figures, the tokenizer, masks and batches."""
import collections
import itertools
import math
import os

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
    tokens, positions, answers, sources = data.collate(rows)
    assert tokenizer.decode(tokens[0][answers[0] > 0].tolist()) == " tense superb<|endoftext|>"
    assert answers.tolist() == [[0] * 7 + [1] * 3 + [0], [0] * 7 + [1] * 4]
    assert all(part.dtype == torch.int64 and part.shape == (2, 11) for part in (tokens, positions, sources))
    x, y_w = rows[0]
    tokens, positions, answers, sources = (part[0].tolist() for part in data.collate(
        [(x, y_w, data.encode(tokenizer, "", " dull")[1]), (x, *[y_w + [0]] * 2)]))
    assert positions[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8]
    assert answers == [0] * 7 + [1] * 3 + [2] * 2 + [0] * 3
    assert sources == [0] * 7 + [6, 7, 8] + [6, 10] + [0] * 3


def test_the_mask_comes_from_lengths_and_not_from_ids():
    """Token 0 is padding here, and it may stand in a prompt or a completion all the same."""
    tokens, _, answers, _ = data.collate([([0, 0], [0, 5, 0]), ([1], [2])])
    assert tokens.tolist() == [[0, 0, 0, 5, 0], [1, 2, 0, 0, 0]]
    assert answers.tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


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


GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
BAD = [  # a line, and what the error says of it after path:line:
    (b"not json\n", "Expecting value"), (b"{'prompt': 'p'}\n", "Expecting property name"),
    (GOOD[:-2] + b"\n", "Expecting ',' delimiter"), (b"[]\n", "expected a JSON object"),
    (b'"text"\n', "expected a JSON object"), (b"null\n", "expected a JSON object"), (b"3\n", "expected a JSON object"),
    (b"{}\n", "expected prompt to be text"), (b'{"prompt": "p", "chosen": "a"}\n', "expected rejected to be text"),
    (b'{"Prompt": "p", "chosen": "a", "rejected": "b"}\n', "expected prompt to be text"),
    (GOOD.replace(b'"p"', b"null"), "expected prompt to be text"), (GOOD.replace(b'"a"', b"7"), "expected chosen to be text"),
    (GOOD.replace(b'"b"', b'["b"]'), "expected rejected to be text"),
    (GOOD.replace(b'"a"', b'{"role": "user"}'), "expected chosen to be text"),
    (GOOD.replace(b'"p"', b'""'), "expected prompt to be text, not empty"),
    (GOOD.replace(b'"b"', b'" \\n "'), "expected rejected to be text, not empty"),
    (GOOD.replace(b'"a"', b'"a\\u0000"'), "expected chosen to be text, not empty and without NUL"),
    (GOOD.replace(b"a", b"\x00"), "Invalid control character"), (GOOD.replace(b"b", b"\xff", 1), "'utf-8' codec"),
    (GOOD.replace(b'"a"', b'"\xc3"'), "'utf-8' codec"), (GOOD.replace(b'"a"', b'"\\x"'), "Invalid \\escape"),
    (GOOD[:-1] * 2 + b"\n", "Extra data"), (b"[" * 100_000 + b"\n", "maximum recursion depth"),
    (GOOD.replace(b'"a"', b"1" * 5000), "Exceeds the limit"), ("\u2028\n".encode(), "Expecting value"),
]


@pytest.mark.parametrize("line, message", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD * 16 + line + GOOD)
    with pytest.raises(ValueError) as refused:
        data.read_jsonl(path)
    assert str(refused.value).startswith(f"{path}:17: {message}") and "\n" not in str(refused.value)


def test_a_file_without_pairs_is_refused_and_one_from_windows_is_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for nothing in (b"", b"\n \n"):
        path.write_bytes(nothing)
        with pytest.raises(ValueError, match="pairs.jsonl: expected a pair"):
            data.read_jsonl(path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n" + GOOD.replace(b"p\"", b"p\\u00e9\\ud800\"", 1)[:-1])
    assert data.read_jsonl(path)[0] == ("p", "a", "b") and len(data.read_jsonl(path)) == 2
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError):
            data.read_jsonl(missing)


def test_prompts_are_held_out_with_all_of_their_pairs(tokenizer):
    texts = [(f"p{i % 50}", f"a{i}", f"b{i}") for i in range(200)]
    train, held_out, counts = data.split_pairs(texts, tokenizer, 64, 0.1, seed=0)
    assert len(train) == counts["to train on"] == 180 and len(held_out) == counts["held out"] == 20
    assert len({tuple(x) for x, _, _ in held_out}) == 5 and not {tuple(x) for x, _, _ in train} & {tuple(x) for x, _, _ in held_out}
    assert data.split_pairs(texts, tokenizer, 64, 0.1, seed=0)[1] == held_out != data.split_pairs(texts, tokenizer, 64, 0.1, seed=1)[1]
    assert all(y[-1] == tokenizer.eot_token for _, *both in train + held_out for y in both)
    for share, prompts in ((1e-9, 1), (0.999, 49)):  # at least one prompt on either side
        held_out = data.split_pairs(texts, tokenizer, 64, share, seed=0)[1]
        assert len({tuple(x) for x, _, _ in held_out}) == prompts
    with pytest.raises(ValueError, match="expected usable pairs of two prompts or more, got 1"):
        data.split_pairs(texts[::50], tokenizer, 64, 0.1, seed=0)


def test_long_pairs_are_cut_or_dropped_and_counted(tokenizer):
    """Of 16 tokens an answer and its EOS may take 8; the prompt keeps the last of what is left."""
    texts = [("0123456789", "abc", "de"), ("q", "a" * 7, "b"), ("q", "a" * 8, "b"), ("r" * 10, "a" * 7, "b"), ("q", "same", "same"),
             ("q", "x", "y"), ("q", "x", "y"), ("q", "y", "x")]
    train, held_out, counts = data.split_pairs(texts, tokenizer, 16, 1e-9, seed=0)
    assert counts == {"to train on": len(train), "held out": len(held_out), "too long, dropped": 1,
                      "identical, dropped": 1, "prompts cut": 1, "duplicate": 1, "contradictory": 1}
    pairs = {tokenizer.decode(x): (x, y_w, y_l) for x, y_w, y_l in train + held_out}
    assert set(pairs) == {"0123456789", "q", "r" * 8}
    assert all(len(x) + max(len(y_w), len(y_l)) <= 16 for x, y_w, y_l in pairs.values())


def test_the_pairs_kept_for_these_tests_are_clean(tokenizer):
    texts = data.read_jsonl(os.path.join(os.path.dirname(__file__), "pairs.jsonl"))
    counts = data.split_pairs(texts, tokenizer, 256, 0.1, seed=0)[2]
    assert 190 <= len(texts) <= 210 and sum(counts.values()) == len(texts)


def test_a_vocabulary_that_cannot_be_had_is_one_line_that_names_the_alternative(monkeypatch):
    def offline(name):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="the gpt2 vocabulary .* --tokenizer toy needs no download") as refused:
        data.get_tokenizer("gpt2")
    assert "\n" not in str(refused.value)
