"""data.py: tokenizers, masks and batches, pairs from a file, the toy task and its exact figures."""
import collections
import gzip
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

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
    train, held_out = data.toy_prompts()
    assert len(set(train)) == 80 and len(set(held_out)) == 20 and not set(train) & set(held_out)
    assert "Last night I watched a romance:" in train and "Last night we saw a romance:" in held_out
    assert not {p.rsplit(" ", 1)[0] for p in train} & {p.rsplit(" ", 1)[0] for p in held_out}
    for part in data.OPENINGS + data.VERBS + data.GENRES:
        assert any(part in p for p in train) and any(part in p for p in held_out)


def test_the_corpus_has_the_stated_lengths_words_and_prompts():
    """20, 30 and 50 % of the reviews have one, two and three words. In each genre three words are three times as frequent."""
    typical = {"comedy": "funny silly dull", "thriller": "tense loud slow", "romance": "tender silly slow",
               "documentary": "honest slow dull"}
    prompts, n = data.toy_prompts()[0], 60_000
    reviews = data.toy_reviews(prompts, n, np.random.default_rng(0))
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
    assert reviews[:100] != data.toy_reviews(prompts, n, np.random.default_rng(1))[:100]


def test_the_simulated_annotator_is_bradley_terry():
    """Eq. 1: the first is preferred with probability σ(r_1 - r_2); a tie is a coin."""
    rng = np.random.default_rng(0)
    for gap in (-2.0, 0.0, 1.0, 4.0):
        wins = data.prefers_first(np.full(40_000, gap + 3), np.full(40_000, 3), rng)
        assert wins.mean() == pytest.approx(1 / (1 + math.exp(-gap)), abs=0.01)


def random_policies(seed, prompts=(THRILLER, COMEDY)):
    logits = 3 * torch.randn(len(prompts), 1885, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, -1] = 11  # malformed text has a probability of about a third
    return logits.log_softmax(-1)


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
    labels = ("objective E[r] - β KL", "E[r]", "KL(π‖π_ref), nats", "P(well-formed)", "win rate against SFT", "preference accuracy",
              "implicit reward margin", "DPO loss, nats", "Δ log π(chosen), nats", "Δ log π(rejected), nats")
    assert list(data.FIGURES.items()) == list(zip(exact, labels, strict=True))
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


@pytest.mark.parametrize("rest", [-800.0, -math.inf])
def test_a_reference_with_one_outcome_has_no_pairs_and_its_pair_figures_are_nan(rest):
    ref, rewards = torch.full((2, 5), rest).double(), torch.arange(5.0).double().expand(2, 5)
    ref[:, 3] = 0
    policy = torch.full((2, 5), 0.2).double().log()
    assert all(math.isnan(x) for x in data.pair_figures(policy, ref, rewards, 1.0).values())
    assert data.exact_figures(policy, ref, rewards, 1.0)["reward"] == pytest.approx(2)


def test_the_toy_tokenizer_encodes_any_text_and_each_word_as_one_token(tokenizer):
    for text in ("Héllo wörld\n\n42", "a  sawdust I", "日本語 🙂", "<|endoftext|>", " " * 7, "", "\x00\r\t"):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    for prompt in sum(data.toy_prompts(), []):
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
    prompt, completion = data.encode(tokenizer, "<|endoftext|>", "<|endoftext|>")  # text that spells EOS stays text
    assert eos not in prompt + completion[:-1] and completion[-1] == eos


def test_decode_marks_a_completion_without_eos(tokenizer):
    _, completion = data.encode(tokenizer, THRILLER, " tense dull")
    assert [data.decode(tokenizer, ids) for ids in (completion, completion[:-1], [])] == [" tense dull", " tense dull…", "…"]
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
    if n > 100:
        longest = [max(map(data.length, batch)) for batch in first]
        assert longest != sorted(longest) and longest != sorted(longest, reverse=True)  # batches come in random order
        assert first != second and first != draw(1, 1)
    assert draw(0, 1) == first


def test_each_epoch_groups_examples_of_similar_length_anew():
    """A batch of the second epoch has examples from all parts of the file, and few that were in one batch before."""
    examples = [data.Row([i], [0] * (8 + i % 4)) for i in range(1000)]
    for seed in (0, 1):
        drawn = [{row.prompt[0] for row in batch} for batch in itertools.islice(data.batches(examples, 100, seed), 20)]
        for batch in drawn[10:]:
            assert max(len(batch & earlier) for earlier in drawn[:10]) < 30  # 10 are expected
            assert len({i // 100 for i in batch}) >= 9


GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
MESSAGES = [{"role": "user", "content": "hi"}]
BAD = {  # a line, and what the message says that it found
    "prose": (b"not json\n", r"b'not json\n'"), "half an object": (GOOD[:-2] + b"\n", "b'{"), "two": (GOOD[:-1] * 2 + b"\n", "b'{"),
    "single quotes": (b"{'prompt': 'p'}\n", 'b"{\'prompt'), "a control character": (GOOD.replace(b"a", b"\0"), "b'{"),
    "Latin-1": (GOOD.replace(b'"a"', b'"\xe9"'), "b'{"), "5,000 digits": (GOOD.replace(b'"a"', b"1" * 5000), "b'{"),
    "nested": (b'{"a":' * 100_000 + b"\n", "b'{"), "an array": (json.dumps([ROW]).encode(), "b'["), "null": (b"null\n", r"b'null\n'"),
    "UTF-16": (json.dumps(ROW).encode("utf-16"), r"b'\xff\xfe{"), "gzip": (gzip.compress(GOOD), r"b'\x1f\x8b"),
    "U+2028": ("\u2028\n".encode(), r"b'\xe2\x80\xa8\n'"), "text": (b'"text"\n', "b'\"text"), "no field": (b"{}\n", "{}"),
    "other names": (b'{"question": "p", "chosen": "a"}\n', "{'question': 'str', 'chosen': 'str'}"),
    "1,000 names": (json.dumps(dict.fromkeys(map(str, range(1000)))).encode() + b"\n", "{'0': 'NoneType', ")}
for key in ROW:
    for value, kind in ((None, "NoneType"), (7, "int"), (MESSAGES, "list"), ({"role": "user"}, "dict")):
        BAD[f"{key} {kind}"] = json.dumps(ROW | {key: value}).encode() + b"\n", str({k: kind if k == key else "str" for k in ROW})


@pytest.mark.parametrize("name", BAD)
def test_a_line_in_another_form_is_refused_with_its_number_and_what_it_has(tmp_path, name):
    path, (line, found) = tmp_path / "pairs.jsonl", BAD[name]
    for before in (0, 16):
        path.write_bytes(GOOD * before + line + GOOD)
        with pytest.raises(ValueError) as refused:
            list(data.read_jsonl(path))
        message = str(refused.value)
        assert message.startswith(f"{path}:{before + 1}: expected strings prompt, chosen and rejected, got {found}")
        assert message.endswith("; the README shows how to convert other formats")
        assert "\n" not in message and len(message) < len(str(path)) + 320


def test_files_from_windows_files_joined_to_one_and_lone_surrogates_are_read(tmp_path, tokenizer):
    """Each of the joined files may begin with a byte order mark. Fields that are not used stay in the record."""
    path, bom = tmp_path / "pairs.jsonl", b"\xef\xbb\xbf"
    other = GOOD.replace(b'p"', b'p\\u00e9\\ud800", "id": 3', 1)
    path.write_bytes(bom + GOOD.replace(b"\n", b"\r\n") + b"\r\n \t\n" + bom + other[:-1])
    assert list(data.read_jsonl(path)) == [ROW, ROW | {"prompt": "p\u00e9\ud800", "id": 3}]
    assert len(data.encode_pairs(data.read_jsonl(path), tokenizer, 64)[0]) == 2
    path.write_bytes(bom + b"\n \n")
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


def encoded(texts, tokenizer, block_size, *limit):
    """encode_pairs of (prompt, chosen, rejected), with the ids as text again, and the counts."""
    records = [dict(zip(ROW, three, strict=True)) for three in texts]
    pairs, counts = data.encode_pairs(iter(records), tokenizer, block_size, *limit)
    assert all(ids.dtype == np.int32 for pair in pairs for ids in pair)
    return [tuple(tokenizer.decode(ids).replace("<|endoftext|>", "$") for ids in pair) for pair in pairs], counts


def test_pairs_are_dropped_cut_and_counted_once(tokenizer):
    """Of 16 tokens, a completion with EOS may take 8. The prompt keeps the last tokens that fit beside the longer completion."""
    kept = [("0123456789", "abc", "de"), ("q", "a" * 7, "b"), ("t" * 8, "a" * 7, "b"), ("q", "x", "y"), ("q", "x", "y")]
    cut = [("r" * 9 + "s", "a" * 7, "b"), ("r" * 9 + "s", "b", "a" * 7), ("r" * 99 + "s", "b", "c")]
    long = [("q", "a" * 8, "b"), ("q", "b", "a" * 10), ("r" * 30, "a" * 9, "b")]
    same = [("q", "same", "same"), ("q", "s" * 20, "s" * 20)]  # identical is said rather than too long
    blank = [("q", "", "y"), ("q", "x", " \n"), ("q", "", ""), ("", "x", "y")]
    pairs, counts = encoded(kept + cut + long + same + blank, tokenizer, 16)
    assert pairs == [(x, y + "$", z + "$") for x, y, z in kept] + [
        ("r" * 7 + "s", "a" * 7 + "$", "b$"), ("r" * 7 + "s", "b$", "a" * 7 + "$"), ("r" * 13 + "s", "b$", "c$")]
    assert counts == {"in the file": 17, "dropped: the completions are identical": 2, "dropped: a text is blank": 4,
                      "with a prompt that lost its first tokens": 3,
                      "dropped: a completion over half of --block_size 16; they need --block_size 18 to 22": 3}


def test_the_block_size_that_dropped_pairs_need_keeps_all_of_them_and_the_models_limit_is_named(tokenizer):
    """Only the first 64 characters per token are read. A longer text needs the named block_size or more."""
    texts = [("q", "a" * 149, "b"), ("q", "b", "a" * 400), ("q", "a" * 949, "b")]
    def line(texts, *limit):
        return [name.split("; ", 1)[1] for name in encoded(texts, tokenizer, 16, *limit)[1] if "--block_size" in name]
    assert line(texts) == ["they need --block_size 300 to 1900"]
    assert line(texts, 1024) == ["they need --block_size 300 to 1900; the model of --init allows 1024"]
    assert [len(encoded(texts, tokenizer, size)[0]) for size in (299, 300, 1899, 1900)] == [0, 1, 2, 3] and line(texts[:0]) == []
    for end, more in (("", ""), ("a", " or more")):  # 16 · 64 = 1,024 characters are read
        for three in (("q", "a" * 1024 + end, "b"), ("q", "b", "a" * 1024 + end)):
            assert line(texts + [three], 64) == [f"they need --block_size 300 to 2050{more}; the model of --init allows 64"]


def test_fields_that_are_not_used_are_named_and_counted(tokenizer):
    """In alphabetical order, also those of pairs that are dropped."""
    records = [ROW, ROW | {"system": "s", "turns": 1, "id": 2}, {"model": "m", "id": 3, "date": 4} | ROW | {"chosen": ""}]
    assert data.encode_pairs(records, tokenizer, 64)[1] == {
        "in the file": 3, "dropped: a text is blank": 1, "with fields that are not used: date, id, model, system, turns": 2}
    counts = data.encode_pairs([ROW | dict.fromkeys(f"field {i}" for i in range(1000))], tokenizer, 64)[1]
    assert any(name.startswith("with fields that are not used: field 0, field 1") and len(name) < 250 for name in counts)


def test_white_space_at_the_ends_of_a_text_is_kept(tokenizer):
    texts = ("\n p ", " a \n", "\ta  ")
    assert encoded([texts], tokenizer, 64)[0] == [(texts[0], texts[1] + "$", texts[2] + "$")]
    row = data.encode(tokenizer, *texts[:2])
    assert tokenizer.decode(row.prompt) == texts[0] and data.decode(tokenizer, row.completion) == texts[1]


def test_a_very_long_prompt_keeps_its_end(tokenizer):
    pairs, counts = encoded([(" " * 1_200_000 + "a" * 30_000 + "z", "x", "y"), ("a" * 5000, "x", "y")], tokenizer, 64)
    assert pairs[0][0] == "a" * 61 + "z" and counts["with a prompt that lost its first tokens"] == 2


def pairs_of(prompts):
    return [data.Pair(np.array(ids, np.int32), [i], [i, i]) for i, ids in enumerate(prompts)]


def test_prompts_are_held_out_with_all_of_their_pairs():
    """A tenth of 500 prompts, one of them with many pairs. The held-out pairs come in random order, since only the first
    ones are evaluated."""
    pairs = pairs_of([[min(i % 700, 499)] for i in range(2100)])
    split = lambda seed, fraction=0.1: data.split_pairs(pairs, fraction, 64, seed)
    train, held_out = split(0)
    prompts, others = ({pair.prompt[0] for pair in side} for side in (held_out, train))
    assert len(prompts) == 50 and len(others) == 450 and not prompts & others
    assert min(prompts) < 100 and max(prompts) > 400  # they are drawn from the whole file
    numbers = [pair.chosen[0] for pair in held_out]
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.5
    assert [pair.chosen[0] for pair in train] == sorted(set(range(2100)) - set(numbers))
    assert len(train) + len(held_out) == 2100 and split(0) == (train, held_out) and split(0, 0) == (pairs, [])
    assert len(prompts & {pair.prompt[0] for pair in split(1)[1]}) < 25


@pytest.mark.parametrize("n, fraction, held_out", [(0, 0.1, 0), (1, 0.9, 0), (2, 0.1, 1), (2, 0.9, 1), (25, 0.1, 3), (30, 0.1, 3)])
def test_at_least_one_of_two_prompts_is_held_out_and_never_all(n, fraction, held_out):
    for seed in range(5):
        train, rest = data.split_pairs(pairs_of([[i % n] for i in range(3 * n)]), fraction, 64, seed)
        assert len(rest) == 3 * held_out and len(train) == 3 * (n - held_out)


def test_prompts_with_the_same_end_after_a_cut_are_on_one_side():
    """Of a block of 40 tokens, a cut may leave the last 20 of a prompt. A shorter prompt is its own end."""
    end = list(range(20))
    pairs = pairs_of([[i] * i + end for i in range(50, 60)] + [end[1:]] + [[i] + end[1:] for i in range(30, 49)])
    for seed in range(5):
        for side in data.split_pairs(pairs, 0.5, 40, seed):
            assert sum(len(pair.prompt) >= 50 for pair in side) in (0, 10) and len(side) in (10, 19, 20, 11)


def test_data_does_not_depend_on_pythons_hash(capsys):
    """Word ids, split, reviews and batches are the same in another process, whose sets have another order."""
    code = """import numpy as np, data
pairs = [data.Pair(np.array([i], np.int32), [1], [2]) for i in range(40)]
print([pair.prompt[0] for pair in data.split_pairs(pairs, 0.5, 64, 0)[1]])
print(data.toy_tokenizer().encode_ordinary("".join(data.toy_prompts()[0] + data.REVIEWS[:12])))
print(data.toy_prompts(), data.toy_reviews(data.toy_prompts()[0], 20, np.random.default_rng(0)))
print(next(data.batches([data.Row([i], [i]) for i in range(40)], 20, 0)))"""
    exec(code, {})
    process = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(data.__file__).parent, capture_output=True, text=True,
                             env=os.environ | {"PYTHONHASHSEED": "12345"})
    assert process.stdout == capsys.readouterr().out != "", process.stderr


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), PermissionError(13, "no"), ValueError("the hash differs")])
def test_a_vocabulary_that_cannot_be_had_gives_a_one_line_error(monkeypatch, error):
    def offline(name):
        raise error
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="^the gpt2 vocabulary .* --tokenizer toy needs no download$"):
        data.get_tokenizer("gpt2")
    for name in ("", "foo", None):
        with pytest.raises(ValueError, match=f"^unknown tokenizer {name!r}; expected toy or one of tiktoken's$"):
            data.get_tokenizer(name)
    assert data.get_tokenizer("toy").name == "toy"
