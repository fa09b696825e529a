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
from dpo import dpo_loss, optimal_logps, preference_metrics

THRILLER, COMEDY = "Last night we saw a thriller:", "Last night we saw a comedy:"


@pytest.fixture(scope="module")
def tokenizer():
    return data.toy_tokenizer()


def test_the_world_has_1884_reviews_a_prompt():
    assert len(data.REVIEWS) == len(set(data.REVIEWS)) == 12 + 144 + 1728 == 1884


def test_each_genre_has_words_of_its_own():
    """The world that the README's and the tutorial's figures belong to, seen from the genres: from 2 down to -2."""
    worth = {
        "comedy": "superb funny | clever charming silly | tender honest loud | tense slow dull | awful",
        "thriller": "superb clever tense | loud | honest | charming funny tender dull | slow silly awful",
        "romance": "superb charming tender | funny honest | clever slow | tense loud silly dull | awful",
        "documentary": "superb honest | clever tender slow | charming funny tense | silly dull | loud awful",
    }
    for genre, words in worth.items():
        for value, names in zip((2, 1, 0, -1, -2), words.split("|")):
            assert all(data.reward(f"I watched a {genre}:", f" {name}") == value for name in names.split())
    assert all(sorted(words.replace("|", " ").split()) == sorted(data.WORTH) for words in worth.values())


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


def test_exact_figures_of_a_policy_agree_with_a_million_samples():
    p, ref, rewards = random_policies(0), random_policies(1), data.outcome_rewards([THRILLER, COMEDY])
    exact = data.exact_figures(p, ref, rewards, 0.5)
    generator = torch.Generator().manual_seed(2)
    y = torch.multinomial(p.exp(), 500_000, replacement=True, generator=generator)
    other = torch.multinomial(ref.exp(), 500_000, replacement=True, generator=generator)
    r, r_other = rewards.gather(1, y), rewards.gather(1, other)
    sampled = {"reward": r.mean(), "kl": (p - ref).gather(1, y).mean(), "valid": (y < 1884).double().mean(),
               "win_rate": (r > r_other).double().mean() + (r == r_other).double().mean() / 2}
    sampled["objective"] = sampled["reward"] - 0.5 * sampled["kl"]
    assert list(exact) == list(data.FIGURES)
    assert {name: exact[name] for name in sampled} == pytest.approx({k: v.item() for k, v in sampled.items()}, abs=0.02)
    same = data.exact_figures(ref, ref, rewards, 0.5)
    assert same["kl"] == 0 and same["win_rate"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_exact_figures_of_pairs_agree_with_a_million_labelled_samples(beta):
    """What DPO logs on endlessly many pairs; identical ones are dropped."""
    ref, rewards = random_policies(1), data.outcome_rewards([THRILLER, COMEDY])
    assert (2 * ref).exp().sum(-1).min() > 0.01  # so often the two would be one
    generator = torch.Generator().manual_seed(2)
    y = torch.multinomial(ref.exp(), 1_000_000, replacement=True, generator=generator)
    first, second = y.view(2, 500_000, 2).unbind(-1)
    wins = torch.from_numpy(data.prefers_first(rewards.gather(1, first), rewards.gather(1, second), np.random.default_rng(0)))
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    for policy in (optimal_logps(ref, rewards, beta), (ref + random_policies(3) / 20).log_softmax(-1)):
        changes = [(policy - ref).gather(1, y)[first != second] for y in (chosen, rejected)]
        metrics = preference_metrics(*dpo_loss(*changes, *torch.zeros_like(torch.stack(changes)), beta), *changes)
        sampled = {"accuracy": metrics["rewards/accuracies"], "loss": metrics["loss"], "margin": metrics["rewards/margins"],
                   "chosen_change": changes[0], "rejected_change": changes[1]}
        exact = data.exact_figures(policy, ref, rewards, beta)
        for name, values in sampled.items():
            error = values.std().item() / len(values) ** 0.5
            assert exact[name] == pytest.approx(values.mean().item(), abs=5 * error + 1e-4), name


def test_exact_figures_at_the_start_and_at_the_optimum():
    """A policy equal to its reference foretells nothing. The optimum has the highest objective, the lowest loss, which is
    the mean entropy of the labels, and the accuracy of the true reward; a constant added to a prompt's rewards adds up."""
    ref, rewards = random_policies(1), data.outcome_rewards([THRILLER, COMEDY])
    start = data.exact_figures(ref, ref, rewards, 2.0)
    assert start["accuracy"] == pytest.approx(0.5, abs=1e-6) and start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["margin"] == start["chosen_change"] == start["rejected_change"] == start["kl"] == 0
    best = data.exact_figures(optimal_logps(ref, rewards, 2.0), ref, rewards, 2.0)
    assert best["objective"] == pytest.approx(2 * torch.logsumexp(ref + rewards / 2, -1).mean().item(), abs=1e-6)
    for seed in range(4):
        near = (optimal_logps(ref, rewards, 2.0) + random_policies(seed) / 5).log_softmax(-1)
        other = data.exact_figures(near, ref, rewards, 2.0)
        assert other["objective"] < best["objective"] and other["loss"] > best["loss"] and other["accuracy"] < best["accuracy"]
    shifted = data.exact_figures(optimal_logps(ref, rewards, 2.0), ref, rewards + 3, 2.0)
    assert shifted["objective"] - best["objective"] == pytest.approx(3) and shifted["loss"] == pytest.approx(best["loss"], abs=1e-6)


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
    x, y_w = data.encode(tokenizer, THRILLER, " tense superb")
    y_l = data.encode(tokenizer, "", " dull")[1]
    tokens, positions, segments = data.collate([(x, y_w, y_l), (x, y_w + [0], y_l)])
    drawn = [line.split()[1:] for line in data.collate.__doc__.splitlines() if line.split()[:1] in (["positions"], ["segments"])]
    assert [part[0].tolist() for part in (positions, segments)] == [[int(number) for number in row] for row in drawn]
    words = next(line for line in data.collate.__doc__.splitlines() if "tokens  " in line).split()[1:]
    decoded = [tokenizer.decode([i]).strip() for i in tokens[0, :-1].tolist()]
    assert decoded == [{"EOS": "<|endoftext|>"}.get(word, word) for word in words[:-1]] and tokens[0, -1] == 0
    assert all(part.dtype == torch.int64 and part.shape == (2, 14) for part in (tokens, positions, segments))


def test_the_layout_comes_from_lengths_and_not_from_ids():
    """Token 0 is padding here, and it may stand in a prompt or a completion all the same."""
    tokens, positions, segments = data.collate([([0, 0], [0, 5, 0]), ([1], [2])])
    assert tokens.tolist() == [[0, 0, 0, 5, 0], [1, 2, 0, 0, 0]]
    assert segments.tolist() == [[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]


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
        sizes = [len(b) for b in epoch]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1  # no leftover of a single pair
    if n > 10:
        assert [b.tolist() for b in first] != [b.tolist() for b in second]
        assert [b.tolist() for b in first] != [b.tolist() for b in itertools.islice(data.batches(lengths, batch_size, seed=1), count)]
    again = list(itertools.islice(data.batches(lengths, batch_size, seed=0), count))
    assert [b.tolist() for b in again] == [b.tolist() for b in first]


def test_rows_of_like_length_meet_at_random():
    """In the toy world all rows share an eighth, so that batches are plain shuffles."""
    seen = np.concatenate(list(itertools.islice(data.batches(np.full(1000, 11), 100, seed=0), 10)))
    assert abs(np.corrcoef(seen, np.arange(1000))[0, 1]) < 0.1
    assert len(set(seen[:100] // 100)) == 10


GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
BAD = [  # a line, and what the error says of it
    (b"not json\n", "Expecting value"), (b"{'prompt': 'p'}\n", "Expecting property name"),
    (GOOD[:-2] + b"\n", "Expecting ',' delimiter"), (b"[]\n", "TypeError"), (b'"text"\n', "TypeError"), (b"null\n", "TypeError"),
    (b"3\n", "TypeError"), (b"{}\n", "KeyError('prompt')"), (b'{"prompt": "p", "chosen": "a"}\n', "KeyError('rejected')"),
    (b'{"Prompt": "p", "chosen": "a", "rejected": "b"}\n', "KeyError('prompt')"),
    (GOOD.replace(b'"p"', b"null"), "TypeError"), (GOOD.replace(b'"a"', b"7"), "TypeError"),
    (GOOD.replace(b'"b"', b'["b"]'), "TypeError"), (GOOD.replace(b'"a"', b'{"role": "user"}'), "TypeError"),
    (GOOD.replace(b"a", b"\x00"), "Invalid control character"), (GOOD.replace(b"b", b"\xff", 1), "'utf-8'"),
    (GOOD.replace(b'"a"', b'"\xc3"'), "'utf-8'"), (GOOD.replace(b'"a"', b'"\\x"'), "Invalid \\\\escape"),
    (GOOD[:-1] * 2 + b"\n", "Extra data"), (b"[" * 100_000 + b"\n", "maximum recursion depth"),
    (GOOD.replace(b'"a"', b"1" * 5000), "Exceeds the limit"), ("\u2028\n".encode(), "Expecting value"),
]


@pytest.mark.parametrize("line, message", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD * 16 + line + GOOD)
    with pytest.raises(ValueError) as refused:
        data.read_jsonl(path)
    assert str(refused.value).startswith(f'{path}:17: expected {{"prompt": "…", "chosen": "…", "rejected": "…"}}, got ')
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_without_pairs_is_refused_and_one_from_windows_is_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for nothing in (b"", b"\n \n"):
        path.write_bytes(nothing)
        with pytest.raises(ValueError, match="expected a pair to train on, got {'to train on': 0, 'held out': 0}"):
            data.split_pairs(data.read_jsonl(path), data.toy_tokenizer(), 256, 0.1, seed=0)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n" + GOOD.replace(b"p\"", b"p\\u00e9\\ud800\"", 1)[:-1])
    assert data.read_jsonl(path)[0] == ("p", "a", "b") and len(data.read_jsonl(path)) == 2
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError):
            data.read_jsonl(missing)


def test_prompts_are_held_out_with_all_of_their_pairs(tokenizer):
    """A prompt's side hangs on the prompt and the seed alone: more pairs in the file move none to the other side."""
    texts = [(f"p{i % 500}", f"a{i}", f"b{i}") for i in range(2000)]
    train, held_out, counts = data.split_pairs(texts, tokenizer, 64, 0.1, seed=0)
    sides = [{tuple(x) for x, _, _ in side} for side in (train, held_out)]
    assert len(train) == counts["to train on"] and len(held_out) == counts["held out"] and len(train) + len(held_out) == 2000
    assert not sides[0] & sides[1] and len(sides[1]) == pytest.approx(50, abs=20) and len(held_out) == 4 * len(sides[1])
    assert data.split_pairs(texts, tokenizer, 64, 0.1, seed=1)[1] != held_out == data.split_pairs(texts, tokenizer, 64, 0.1, seed=0)[1]
    assert {tuple(x) for x, _, _ in data.split_pairs(texts[::-3], tokenizer, 64, 0.1, seed=0)[1]} == sides[1]
    assert all(y[-1] == tokenizer.eot_token for _, *both in train + held_out for y in both)
    assert data.split_pairs(texts, tokenizer, 64, 0, seed=0)[1] == []
    with pytest.raises(ValueError, match="expected a pair to train on, got .*'held out': 2000"):
        data.split_pairs(texts, tokenizer, 64, 1.0, seed=0)


def test_dialogues_that_end_alike_stand_on_one_side(tokenizer):
    """What a cut leaves decides: beginnings that no row holds do not make two prompts of one."""
    texts = [(f"{i}" * (10 + i) + "the same end, cut" + "!" * 20, f"a{i}", "b") for i in range(10)]
    texts += [(f"other {i}", "a", "b") for i in range(20)]
    for seed in range(3):
        train, held_out, _ = data.split_pairs(texts, tokenizer, 40, 0.5, seed)
        ends = [{tokenizer.decode(x)[-15:] for x, _, _ in side} for side in (train, held_out)]
        assert ends[0] and ends[1] and not ends[0] & ends[1]


def test_what_cannot_be_used_is_dropped_and_what_can_is_kept_and_both_are_counted(tokenizer):
    """Of 16 tokens a completion and its EOS may take 8; the prompt keeps the last of what is left."""
    texts = [("0123456789", "abc", "de"), ("q", "a" * 7, "b"), ("q", "a" * 8, "b"), ("r" * 9 + "s", "a" * 7, "b"), ("q", "same", "same"),
             ("q", "x", "y"), ("q", "x", "y"), ("q", "y", "x"), ("q", "", "y"), ("q", "x", " \n"), ("q", "", ""), ("", "x", "y")]
    train, held_out, counts = data.split_pairs(texts, tokenizer, 16, 1e-9, seed=0)
    assert counts == {"to train on": len(train), "held out": len(held_out), "with too long a completion, dropped": 1,
                      "with identical completions, dropped": 1, "with an empty text, dropped": 4,
                      "with a prompt that was cut": 1, "that repeat an earlier pair": 1, "that contradict an earlier pair": 1}
    assert len(train) + len(held_out) == 6
    pairs = {tokenizer.decode(x): (x, y_w, y_l) for x, y_w, y_l in train + held_out}
    assert set(pairs) == {"0123456789", "q", "r" * 7 + "s"}
    assert all(len(x) + max(len(y_w), len(y_l)) <= 16 for x, y_w, y_l in pairs.values())


def test_the_pairs_kept_for_these_tests_are_clean(tokenizer):
    texts = data.read_jsonl(os.path.join(os.path.dirname(__file__), "pairs.jsonl"))
    counts = data.split_pairs(texts, tokenizer, 256, 0.1, seed=0)[2]
    assert len(texts) == 200 and sum(counts.values()) == 200


def test_a_vocabulary_that_cannot_be_had_is_one_line_that_names_the_alternative(monkeypatch):
    def offline(name):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="the gpt2 vocabulary .* --tokenizer toy needs no download") as refused:
        data.get_tokenizer("gpt2")
    assert "\n" not in str(refused.value)
