"""data.py: tokenizers, masks and batches, pairs from a file, the toy task and its exact figures."""
import collections
import gzip
import itertools
import json
import math
import re

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


def test_word_rewards_of_each_genre():
    """The table that all published figures belong to. For each genre: the words with reward 2 | 1 | 0 | -1 | -2."""
    rewards = {
        "comedy": "superb funny | clever charming silly | tender honest loud | tense slow dull | awful",
        "thriller": "superb clever tense | loud | honest | charming funny tender dull | slow silly awful",
        "romance": "superb charming tender | funny honest | clever slow | tense loud silly dull | awful",
        "documentary": "superb honest | clever tender slow | charming funny tense | silly dull | loud awful",
    }
    for genre, words in rewards.items():
        for value, names in zip((2, 1, 0, -1, -2), words.split("|"), strict=True):
            assert all(data.reward(f"I watched a {genre}:", f" {name}") == value for name in names.split())
        assert sorted(words.replace("|", " ").split()) == sorted(data.WORD_REWARDS)


def test_reward_is_the_sum_of_the_word_rewards_in_the_genre():
    assert len(data.REVIEWS) == len(set(data.REVIEWS)) == 12 + 144 + 1728 == 1884
    assert data.reward(THRILLER, " tense clever superb") == 6
    assert data.reward(COMEDY, " tense clever superb") == 2
    rewards = data.outcome_rewards([THRILLER, COMEDY])
    assert rewards.shape == (2, 1885) and rewards.dtype == torch.float64
    assert rewards[0, data.REVIEWS.index(" tense clever superb")] == 6
    assert rewards[:, :-1].min() == -6 > data.MALFORMED == rewards[0, -1]


@pytest.mark.parametrize("text", ["", " ", " great", " tense tense tense tense", "tense", " tense  dull",
                                  " tense dull ", " Tense", " tense.", " tense…", " tense\n", " tensedull"])
def test_malformed_text_has_a_lower_reward_than_any_review(text):
    assert data.reward(THRILLER, text) == -7


def test_phrasings_are_held_out_whole():
    train, held_out = data.prompts()
    assert len(set(train)) == 80 and len(set(held_out)) == 20 and not set(train) & set(held_out)
    assert "Last night I watched a romance:" in train and "Last night we saw a romance:" in held_out
    phrasing = lambda prompts: {p.rsplit(" ", 1)[0] for p in prompts}
    assert not phrasing(train) & phrasing(held_out)
    for part in data.OPENINGS + data.VERBS + data.GENRES:
        assert any(part in p for p in train) and any(part in p for p in held_out)


def test_the_corpus_has_the_stated_lengths_words_and_prompts():
    """20, 30 and 50 % of the reviews have one, two and three words. In each genre three words are three times as frequent."""
    typical = {"comedy": "funny silly dull", "thriller": "tense loud slow", "romance": "tender silly slow", "documentary": "honest slow dull"}
    prompts, n = data.prompts()[0], 60_000
    reviews = data.corpus(prompts, n, np.random.default_rng(0))
    lengths = collections.Counter(len(y.split()) for _, y in reviews)
    assert [lengths[k] / n for k in (1, 2, 3)] == pytest.approx([0.2, 0.3, 0.5], abs=0.01)
    for genre, frequent in typical.items():
        words = collections.Counter(word for x, y in reviews if genre in x for word in y.split())
        total = sum(words.values())
        for word in data.WORD_REWARDS:  # 3 × 3 + 9 × 1 = 18 parts
            assert words[word] / total == pytest.approx((3 if word in frequent.split() else 1) / 18, rel=0.1), (genre, word)
    counts = collections.Counter(x for x, _ in reviews)
    assert set(counts) == set(prompts) and max(counts.values()) < 1.3 * n / 80
    assert all(data.reward(x, y) > data.MALFORMED for x, y in reviews)
    assert reviews[:100] != data.corpus(prompts, n, np.random.default_rng(1))[:100]


def test_the_simulated_annotator_is_bradley_terry():
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
    """They are what DPO would log on infinitely many pairs, without pairs of identical completions."""
    ref, rewards = random_policies(1), data.outcome_rewards([THRILLER, COMEDY])
    assert (2 * ref).exp().sum(-1).min() > 0.01  # so often the two would be one
    generator = torch.Generator().manual_seed(2)
    y = torch.multinomial(ref.exp(), 1_000_000, replacement=True, generator=generator)
    first, second = y.view(2, 500_000, 2).unbind(-1)
    wins = torch.from_numpy(data.prefers_first(rewards.gather(1, first), rewards.gather(1, second), np.random.default_rng(0)))
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    for policy in (optimal_logps(ref, rewards, beta), (ref + random_policies(3) / 20).log_softmax(-1)):
        changes = [(policy - ref).gather(1, y)[first != second] for y in (chosen, rejected)]
        losses, *both_rewards = dpo_loss(*changes, *torch.zeros_like(torch.stack(changes)), beta)
        metrics = preference_metrics(*both_rewards, *changes)
        sampled = {"accuracy": metrics["rewards/accuracies"], "loss": losses, "margin": metrics["rewards/margins"],
                   "chosen_change": changes[0], "rejected_change": changes[1]}
        exact = data.exact_figures(policy, ref, rewards, beta)
        for name, values in sampled.items():
            error = values.std().item() / len(values) ** 0.5
            assert exact[name] == pytest.approx(values.mean().item(), abs=5 * error + 1e-4), name


def test_exact_figures_at_the_start_and_at_the_optimum():
    """A policy equal to its reference has accuracy ½ and loss ln 2. The optimum has the highest objective, the lowest loss
    and the highest accuracy. A constant added to all rewards is added to the objective."""
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


def test_the_toy_tokenizer_encodes_any_text_and_each_word_as_one_token(tokenizer):
    for text in ("Héllo wörld\n\n42", "a  sawdust I", "日本語 🙂", "<|endoftext|>", " " * 7, "", "\x00\r\t"):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    for prompt in sum(data.prompts(), []):
        assert len(tokenizer.encode_ordinary(prompt)) == 7
    ids = [tuple(tokenizer.encode_ordinary(y)) for y in data.REVIEWS]
    assert len(set(ids)) == 1884 and all(len(y) == len(text.split()) for y, text in zip(ids, data.REVIEWS, strict=True))
    assert tokenizer.eot_token == tokenizer.n_vocab - 1 == 298 and tokenizer.decode([298]) == "<|endoftext|>"


def test_prompt_and_completion_are_encoded_separately_and_end_with_one_eos(tokenizer):
    """If "is 4" + "2" were encoded together, one token would span both, and the completion would be empty."""
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


def test_decode_marks_a_completion_without_eos(tokenizer):
    _, completion = data.encode(tokenizer, THRILLER, " tense dull")
    assert data.decode(tokenizer, completion) == " tense dull"
    assert data.decode(tokenizer, completion[:-1]) == " tense dull…"
    assert data.reward(THRILLER, data.decode(tokenizer, completion[:-1])) == data.MALFORMED


def test_collate_gives_the_tokens_and_the_mask_of_its_docstring(tokenizer):
    drawn = {line.split()[0]: line.split()[1:] for line in data.collate.__doc__.splitlines() if line.startswith("        ")}
    row = data.encode(tokenizer, THRILLER, " tense superb")
    tokens, mask = data.collate([row, data.encode(tokenizer, THRILLER, " tense superb dull")])
    decoded = [tokenizer.decode([i]).strip() for i in tokens[0, :-1].tolist()]
    assert decoded == [{"EOS": "<|endoftext|>"}.get(word, word) for word in drawn["tokens"][:-1]] and tokens[0, -1] == 0
    assert mask[0].tolist() == [bool(int(number)) for number in drawn["mask"]]
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool and tokens.shape == mask.shape == (2, 11)


def test_the_mask_comes_from_lengths_and_not_from_ids():
    """Id 0 is padding here, but it can also occur in a prompt or a completion."""
    tokens, mask = data.collate([data.Row([0, 0], [0, 5, 0]), data.Row([1], np.array([2], np.int32))])
    assert tokens.tolist() == [[0, 0, 0, 5, 0], [1, 2, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


def test_the_length_of_an_example_is_that_of_its_longest_row():
    assert data.length(data.Row([1, 2], [3])) == 3 and data.length(data.Pair([1], [2], [3, 4])) == 3
    assert data.length(data.Pair([1], [2, 3, 4], [5])) == data.length(data.ScoredPair([1], [2, 3, 4], [5], -1.0, -2.0)) == 4


@pytest.mark.parametrize("n, batch_size", [(103, 10), (5, 8), (40, 10), (1, 1)])
def test_an_epoch_has_every_example_once_in_batches_of_similar_length(n, batch_size):
    rng, count = np.random.default_rng(0), math.ceil(n / batch_size)
    examples = [data.Row([i], [0] * k) for i, k in enumerate(rng.integers(1, 200, n))]
    draw = lambda seed, epochs: list(itertools.islice(data.batches(examples, batch_size, seed), epochs * count))
    first, second = draw(0, 2)[:count], draw(0, 2)[count:]
    for epoch in (first, second):
        assert sorted(row.prompt[0] for batch in epoch for row in batch) == list(range(n))
        eighths = [sorted(data.length(row) // 8 for row in batch) for batch in epoch]
        assert all(max(a) <= min(b) or min(a) >= max(b) for a, b in itertools.combinations(eighths, 2))
        sizes = [len(batch) for batch in epoch]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1  # no last batch of a single example
    if n > 10:
        longest = [max(map(data.length, batch)) for batch in first]
        assert longest != sorted(longest) and longest != sorted(longest, reverse=True)  # batches come in random order
        assert first != second and first != draw(1, 1)
    assert draw(0, 1) == first


def test_examples_of_similar_length_are_shuffled():
    examples = [data.Row([i], [0] * 10) for i in range(1000)]
    seen = [row.prompt[0] for batch in itertools.islice(data.batches(examples, 100, seed=0), 10) for row in batch]
    assert abs(np.corrcoef(seen, np.arange(1000))[0, 1]) < 0.1 and len({i // 100 for i in seen[:100]}) == 10


GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
MESSAGES = [{"role": "user", "content": "hi"}]
NOT_JSON, NOT_STRINGS = "expected one JSON object per line, as the README shows, but got b", 'expected strings for "prompt", "chosen" and "rejected", but '
BAD = [  # a line, and what the error says about it
    (b"not json\n", NOT_JSON), (b"prompt,chosen,rejected\n", NOT_JSON), (b"{\n", NOT_JSON), (b"{'prompt': 'p'}\n", NOT_JSON),
    (GOOD[:-2] + b"\n", NOT_JSON), (GOOD[:-1] * 2 + b"\n", NOT_JSON), (GOOD.replace(b"a", b"\x00"), NOT_JSON),
    (GOOD.replace(b"b", b"\xff", 1), NOT_JSON), (GOOD.replace(b'"a"', b'"\xc3"'), NOT_JSON), (GOOD.replace(b'"a"', b"1" * 5000), NOT_JSON),
    (b'{"a":' * 100_000 + b"\n", NOT_JSON), ("\u2028\n".encode(), NOT_JSON),
    (b'"text"\n', "expected a JSON object, got 'text'"), (b"null\n", "expected a JSON object, got None"), (b"3\n", "expected a JSON object, got 3"),
    (b"{}\n", NOT_STRINGS + '"prompt" is not in []'), (b'{"prompt": "p", "chosen": "a"}\n', NOT_STRINGS + "\"rejected\" is not in ['prompt', 'chosen']"),
    (b'{"question": "p", "chosen": "a", "rejected": "b"}\n', NOT_STRINGS + "\"prompt\" is not in ['question', 'chosen', 'rejected']"),
    *[(json.dumps(ROW | {key: value}).encode() + b"\n", f'{NOT_STRINGS}"{key}" is {value!r:.60}; the README shows how to convert')
      for key in ROW for value in (None, 7, True, [], MESSAGES, {"role": "user"}, ["x"] * 1000)],
    (json.dumps([ROW]).encode(), "this is a JSON array; write one object per line"), (b" [\n", "this is a JSON array"),
    (gzip.compress(GOOD), "this is compressed by gzip; unpack it first"), (b"PK\x03\x04\n", "this is a zip archive"),
    (json.dumps(ROW).encode("utf-16"), "this is UTF-16; save it as UTF-8"), (json.dumps(ROW).encode("utf-16")[:2], "this is UTF-16"),
    (b"\xfe\xff\x00{\n", "this is UTF-16"), (b"PAR1\x15\x04\n", "this is a Parquet file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "this is a Git LFS pointer; run git lfs pull"),
]


@pytest.mark.parametrize("line, message", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("before", [0, 16])
def test_a_line_in_another_form_is_refused_with_its_number_and_what_it_is(tmp_path, before, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD * before + line + GOOD)
    with pytest.raises(ValueError) as refused:
        list(data.read_jsonl(path))
    assert str(refused.value).startswith(f"{path}:{before + 1}: {message}")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < len(str(path)) + 300


def test_a_file_from_windows_and_lone_surrogates_are_read(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    surrogate = GOOD.replace(b'p"', b'p\\u00e9\\ud800"', 1)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n \t\n" + surrogate[:-1])
    assert list(data.read_jsonl(path)) == [["p", "a", "b"], ["p\u00e9\ud800", "a", "b"]]
    assert len(data.encode_pairs(data.read_jsonl(path), tokenizer, 64)[0]) == 2
    assert data.encode_pairs([["p", "\ud800", "\ud801"]], tokenizer, 64)[1]["dropped: the completions are identical"] == 1  # same ids
    path.write_bytes(b"\xef\xbb\xbf\n \n")
    assert list(data.read_jsonl(path)) == []
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError):
            list(data.read_jsonl(missing))


def test_long_files_print_a_line_of_progress(tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 4)
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(clock))  # every look at the clock is 4 seconds later
    (tmp_path / "p.jsonl").write_bytes(GOOD * 9)
    list(data.read_jsonl(tmp_path / "p.jsonl"))
    assert [line.split(" lines of ")[0] for line in capsys.readouterr().out.splitlines()] == ["2", "5", "8"]


def test_pairs_are_dropped_cut_and_counted(tokenizer):
    """Of 16 tokens, a completion with EOS may take 8. The prompt keeps the last of the tokens that are left."""
    texts = [("0123456789", "abc", "de"), ("q", "a" * 7, "b"), ("q", "a" * 8, "b"), ("q", "b", "a" * 8), ("r" * 9 + "s", "a" * 7, "b"),
             ("q", "same", "same"), ("t" * 8, "a" * 7, "b"), ("q", "x", "y"), ("q", "x", "y"), ("q", "x", "y"), ("q", "y", "x"),
             ("q", "", "y"), ("q", "x", " \n"), ("q", "", ""), ("", "x", "y")]
    pairs, counts, _ = data.encode_pairs(texts, tokenizer, 16)
    assert counts == {"in the file": 15, "dropped: the completions are identical": 1, "dropped: a text is blank": 4,
                      "dropped: a completion over half of --block_size 16; 95% of the pairs need at most 18": 2,
                      "with a prompt that lost its first tokens": 1, "repeat an earlier pair": 2, "contradict an earlier pair": 1}
    decoded = [tuple(tokenizer.decode(ids) for ids in pair) for pair in pairs]
    eos = "<|endoftext|>"
    assert decoded[:4] == [("0123456789", "abc" + eos, "de" + eos), ("q", "a" * 7 + eos, "b" + eos),
                           ("r" * 7 + "s", "a" * 7 + eos, "b" + eos), ("t" * 8, "a" * 7 + eos, "b" + eos)]
    assert all(ids.dtype == np.int32 for pair in pairs for ids in pair)


def test_the_named_block_size_keeps_95_percent_of_the_pairs(tokenizer):
    """Very long texts are not encoded whole. What they need is estimated."""
    texts = [("q", "a" * k, "b") for k in [100] * 60 + [400] * 37 + [600] * 2 + [2_000_000]]
    for texts in (texts, [("q", "a b " * 60, "b")] * 97 + [("q", "b", "a" * 10**6)] * 3):
        [line] = [name for name in data.encode_pairs(texts, tokenizer, 16)[1] if "--block_size" in name]
        size = int(re.search(r"--block_size 16; 95% of the pairs need at most (\d+)$", line)[1])
        assert len(data.encode_pairs(texts, tokenizer, size)[0]) == 97 > 95 > len(data.encode_pairs(texts, tokenizer, size - 1)[0])
    [line] = [name for name in data.encode_pairs([("q", "a" * 10**6, "b")], tokenizer, 16)[1] if "--block_size" in name]
    assert 1.9e6 < int(re.search(r"at most (\d+)$", line)[1]) < 2.1e6


def test_a_very_long_prompt_keeps_its_end(tokenizer):
    pairs, counts, _ = data.encode_pairs([(" " * 1_200_000 + "a" * 30_000 + "z", "x", "y"), ("a" * 5000, "x", "y")], tokenizer, 64)
    assert tokenizer.decode(pairs[0].prompt) == "a" * 61 + "z" and counts["with a prompt that lost its first tokens"] == 2


def test_gpt2s_tokenizer_takes_blanks_up_to_the_limit_of_characters():
    """It panics on a million blanks before a letter. 64 × the largest block_size stays below that."""
    pattern = tiktoken.Encoding("spaces", pat_str=r"\s+(?!\S)|\s+|\S+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    assert len(pattern.encode_ordinary(" " * (64 * 8192 - 1) + "a")) == 64 * 8192


def test_the_checksum_covers_every_text_in_its_order(tokenizer):
    texts = [["p", "a", "b"], ["q", "c", "d"], ["r", "", "e"]]
    checksum = lambda texts: data.encode_pairs(texts, tokenizer, 64)[2]
    changed = [[[text + "x" if (i, j) == (k, l) else text for j, text in enumerate(row)] for i, row in enumerate(texts)]
               for k in range(3) for l in range(3)]
    assert len({checksum(x) for x in [texts, texts[::-1], texts[:2], *changed]}) == 12 and checksum(texts) == checksum(list(texts))


def pairs_of(texts, tokenizer, block_size=64):
    return data.encode_pairs(texts, tokenizer, block_size)[0]


def test_prompts_are_held_out_with_all_of_their_pairs(tokenizer):
    pairs = pairs_of([(f"p{i % 500}", f"a{i}", f"b{i}") for i in range(2000)], tokenizer)
    split = lambda pairs, fraction=0.1, seed=0: data.split_pairs(pairs, fraction, 64, seed)
    train, held_out = split(pairs)
    sides = [{tuple(pair.prompt) for pair in side} for side in (train, held_out)]
    assert len(train) == 1800 and len(held_out) == 200 and not sides[0] & sides[1] and len(sides[1]) == 50
    others = [{tuple(pair.prompt) for pair in split(pairs, seed=seed)[1]} for seed in (0, 1)]
    assert others[0] == sides[1] != others[1]
    assert {tuple(pair.prompt) for pair in split(pairs[::-1])[1]} == sides[1]  # the order of the file does not matter
    numbers = [int(tokenizer.decode(pair.prompt)[1:]) for pair in held_out]
    assert numbers != sorted(numbers)  # the report shows the first ones: not those at the top of the file
    assert split(pairs, fraction=0)[1] == []


@pytest.mark.parametrize("n_prompts, fraction, held_out", [(1, 0.1, 0), (1, 0.9, 0), (2, 0.1, 1), (2, 0.9, 1), (4, 0.1, 1), (25, 0.1, 2), (31, 0.1, 3), (0, 0.1, 0)])
def test_at_least_one_of_two_prompts_is_held_out_and_never_all(tokenizer, n_prompts, fraction, held_out):
    pairs = pairs_of([(f"prompt {i % n_prompts}", f"a{i}", "b") for i in range(3 * n_prompts)], tokenizer)
    for seed in range(5):
        train, rest = data.split_pairs(pairs, fraction, 64, seed)
        assert len(rest) == 3 * held_out and len(train) == 3 * (n_prompts - held_out)


def test_prompts_with_the_same_end_after_a_cut_are_on_one_side(tokenizer):
    texts = [(f"{i}" * (10 + i) + "the same end, cut" + "!" * 20, f"a{i}", "b") for i in range(10)]
    texts += [(f"other {i}", "a", "b") for i in range(20)]
    pairs = pairs_of(texts, tokenizer, 40)
    for seed in range(3):
        ends = [{tokenizer.decode(pair.prompt)[-15:] for pair in side} for side in data.split_pairs(pairs, 0.5, 40, seed)]
        assert ends[0] and ends[1] and not ends[0] & ends[1]


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), TimeoutError(), OSError("disk"), PermissionError(13, "no"),
                                   ValueError("the hash of the file does not match")])
def test_a_vocabulary_that_cannot_be_downloaded_gives_a_one_line_error(monkeypatch, error):
    def offline(name):
        raise error
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="^the gpt2 vocabulary .* --tokenizer toy needs no download$"):
        data.get_tokenizer("gpt2")
    assert data.get_tokenizer("toy").name == "toy"


@pytest.mark.parametrize("name", ["", "foo", None])
def test_an_unknown_tokenizer_is_named(name):
    with pytest.raises(ValueError, match=f"^unknown tokenizer {name!r}; expected toy or one of tiktoken's$"):
        data.get_tokenizer(name)
