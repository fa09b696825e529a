"""model.py against a naive NumPy transformer, and sampling against the model's own probabilities."""
import math

import numpy as np
import pytest
import torch

import data
from dpo import sequence_logps
from model import GPT, GPTConfig

EOS = 10


def tiny(dtype=torch.float64, **shape):
    """A GPT away from its initial values, at which many faults do not show: its greedy texts differ."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(**{"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8} | shape))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1 if name == "ln_f.bias" else 0.8)
    return model.to(dtype)


def naive_forward(model, row):
    """One row through GPT-2's equations, in NumPy with explicit loops for attention."""
    w = {name: p.detach().numpy().astype(float) for name, p in model.named_parameters()}
    C, nh = model.config.n_embd, model.config.n_head
    hs = C // nh
    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * w[name + ".weight"] + w[name + ".bias"]
    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]
    x = np.array([w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(row)])
    for i in range(model.config.n_layer):
        qkv, y = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), np.zeros_like(x)
        for head in range(nh):
            for t in range(len(row)):
                q = qkv[t, head * hs:(head + 1) * hs]
                scores = [q @ qkv[s, C + head * hs:C + (head + 1) * hs] / math.sqrt(hs) for s in range(t + 1)]
                weights = np.exp(scores) / np.sum(np.exp(scores))
                for s in range(t + 1):
                    y[t, head * hs:(head + 1) * hs] += weights[s] * qkv[s, 2 * C + head * hs:2 * C + (head + 1) * hs]
        x = x + linear(y, f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        gelu = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + linear(gelu, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", [{"n_layer": 1}, {"n_layer": 3, "n_head": 4}])
def test_logits_equal_a_naive_numpy_forward_pass(dtype, tolerance, shape):
    model, row = tiny(dtype, **shape), [3, 1, 4, 1, 5, 9, 2]
    logits = model(torch.tensor([row]))[0].detach().numpy()
    assert logits.dtype == {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    assert np.abs(logits - naive_forward(model, row)).max() < tolerance * np.abs(logits).max()


def test_changing_a_token_changes_no_logit_before_it():
    model = tiny()
    tokens = torch.randint(11, (1, 9), generator=torch.Generator().manual_seed(0))
    for t in range(9):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        before, after = model(tokens)[0], model(changed)[0]
        assert torch.equal(before[:t], after[:t]) and not torch.allclose(before[t], after[t])


def test_right_padding_needs_no_attention_mask():
    """A short row scores alike alone and in a batch, whatever the padding holds."""
    model = tiny()
    row = torch.tensor([[3, 1, 4]])
    for padding in (0, 7, EOS):
        batch = torch.tensor([[3, 1, 4] + [padding] * 5, [2, 7, 1, 8, 2, 8, 1, 8]])
        assert torch.allclose(model(batch)[0, :3], model(row)[0], atol=1e-12)


def test_shapes_and_the_errors_that_name_them():
    model = tiny()
    assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 11)
    assert model.hidden(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 8)
    with pytest.raises(ValueError, match="expected at most block_size = 12 tokens, got 13"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="expected n_head to divide n_embd = 8, got 3"):
        GPTConfig(vocab_size=11, n_head=3, n_embd=8)


def test_initialisation_is_gpt2s():
    """Normal of std 0.02, residual projections by 1/sqrt(2 n_layer) less, biases 0, norms 1; the
    output projection is the embedding, so that the two have one set of weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 0.1 * std
    assert sum(p.numel() for p in model.parameters()) == 564 * 128 + 256 + 8 * (12 * 128**2 + 13 * 128)


def test_gpt_is_the_same_in_training_and_evaluation_and_draws_no_random_numbers():
    """No dropout: a policy in train mode and a reference in eval mode agree at step 0."""
    model, tokens = tiny(), torch.tensor([[1, 2, 3]])
    state = torch.get_rng_state()
    assert torch.equal(model.train()(tokens), model.eval()(tokens))
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_0_takes_the_argmax_of_every_step_in_ragged_batches(monkeypatch):
    """50 prompts of one to five tokens in one batch continue as each does alone, by hand."""
    model, rng, expected = tiny(), np.random.default_rng(0), []
    prompts = [rng.integers(10, size=n).tolist() for n in rng.integers(1, 6, 50)]
    for prompt in prompts:
        row = list(prompt)
        while len(row) < len(prompt) + 6 and (row == prompt or row[-1] != EOS):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        expected.append(row)
    assert len({tuple(row[-3:]) for row in expected}) > 5  # the prompts do matter
    completions = [row[len(p):] for p, row in zip(prompts, expected)]
    assert model.sample(prompts, 6, 0, EOS) == completions
    short, passes, hidden = [i for i, y in enumerate(completions) if len(y) < 4], [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *arguments, **cache: passes.append(1) or hidden(*arguments, **cache))
    model.sample([prompts[i] for i in short], 6, 0, EOS)
    assert len(passes) == max(len(completions[i]) for i in short) > min(len(completions[i]) for i in short)  # all ended
    monkeypatch.setattr("model.MAX_TOKENS", 80)
    assert model.sample(prompts, 6, 0, EOS) == completions


def test_a_completion_stops_at_eos_or_at_the_limit():
    completions = tiny().sample([[3, 3]] * 200, 9, 1.0, EOS, torch.Generator().manual_seed(0))
    lengths = {len(y) for y in completions}
    assert min(lengths) >= 1 and max(lengths) == 9 and len(lengths) > 4
    for y in completions:
        assert EOS not in y[:-1] and (y[-1] == EOS or len(y) == 9)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_probabilities(temperature):
    """χ² of 20,000 samples over two tokens against softmax(logits / temperature), at p = 0.001."""
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    n = 20_000
    tokens = torch.tensor([(y + [EOS])[:2] for y in model.sample([[3]] * n, 2, temperature, EOS, generator)])
    with torch.no_grad():
        first = (model(torch.tensor([[3]]))[0, -1] / temperature).softmax(-1)
        second = (model(torch.tensor([[3, a] for a in range(11)]))[:, -1] / temperature).softmax(-1)
    second[EOS] = torch.eye(11, dtype=torch.float64)[EOS]  # after EOS comes EOS
    expected = n * (first[:, None] * second).flatten()
    counts = torch.bincount(tokens[:, 0] * 11 + tokens[:, 1], minlength=121)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    chi2 = ((counts - expected) ** 2 / expected)[common].sum().item()
    k = common.sum().item()
    assert chi2 < k + 3.1 * math.sqrt(2 * k) + 6  # the 0.999 quantile for k degrees of freedom, about


def test_sampling_repeats_by_its_generator_and_leaves_the_global_one_alone():
    model, state = tiny(), torch.get_rng_state()
    draw = lambda seed: model.sample([[3, 1]] * 50, 5, 1.0, EOS, torch.Generator().manual_seed(seed))
    model.train()
    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(torch.get_rng_state(), state) and model.training


@pytest.mark.parametrize("K, at_once", [(1, 2**24), (2, 2**24), (3, 2**24), (32, 2**24), (1, 5), (3, 22)])
def test_completions_beside_one_prompt_score_as_in_rows_of_their_own(K, at_once, monkeypatch):
    """completion_logps of rows of different lengths against sequence_logps of plain ones, gradients too; also where the
    logits are made one or two positions at a time."""
    monkeypatch.setattr("model.MAX_LOGITS", at_once)
    model, rng = tiny(block_size=14), np.random.default_rng(K)
    draw = lambda low, high: rng.integers(11, size=rng.integers(low, high)).tolist()
    examples = [(draw(1, 6), *(draw(1, 7) for _ in range(K))) for _ in range(9)]
    together = model.completion_logps(*data.collate(examples))
    alone = []
    for prompt, *completions in examples:
        for y in completions:
            tokens, mask = torch.tensor([prompt + y]), torch.tensor([[False] * len(prompt) + [True] * len(y)])
            alone.append(sequence_logps(model(tokens), tokens, mask))
    alone = torch.cat(alone).view(9, K)
    assert together.shape == (9, K) and together.dtype == torch.float64 and (together - alone).abs().max() < 1e-12
    weights = torch.randn(9, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad((weights * logps).sum(), list(model.parameters()))])
                 for logps in (together, alone)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12 * gradients[1].abs().max()


def test_completion_logps_are_summed_in_float32_under_bfloat16():
    model = tiny(torch.float32, vocab_size=50, block_size=300)
    batch = data.collate([([1, 2], list(range(3, 50)) * 6)])
    with torch.autocast("cpu", torch.bfloat16):
        logps = model.completion_logps(*batch)
        hidden = model.hidden(*batch[:2])
        logits = torch.nn.functional.linear(hidden, model.wte.weight)
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(sequence_logps(logits, batch[0], batch[1] >= 2).item(), rel=1e-5)
    assert model.bfloat16().completion_logps(*batch).dtype == torch.float32


def test_the_cache_gives_the_activations_of_the_whole_row():
    """Keys and values of earlier tokens, then one token at a time: what a forward pass of all gives."""
    model, tokens = tiny(), torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    cache = {}
    parts = [model.hidden(tokens[:, :3], cache=cache)]
    for t in range(3, 6):
        mask = torch.ones(2, 1, 1, t + 1, dtype=torch.bool)
        parts.append(model.hidden(tokens[:, t:t + 1], torch.full((2, 1), t), mask, cache))
    assert torch.allclose(torch.cat(parts, 1), model.hidden(tokens), atol=1e-12)


def test_prompts_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="to fit into block_size = 12, got 13, 4 new"):
        tiny().sample([[1], [1] * 9], 4, 1.0, EOS)
    with pytest.raises(ValueError, match="1 or more new tokens .* got 1, 0 new"):
        tiny().sample([[1]], 0, 1.0, EOS)


def gpt2_weights(model):
    """The weights of a model under GPT-2's published names and in its published layout."""
    weights = {}
    for name, w in model.state_dict().items():
        transposed = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith("weight")
        weights[name] = w.T.contiguous() if transposed else w
    T = model.config.block_size
    for i in range(model.config.n_layer):
        weights[f"h.{i}.attn.bias"] = torch.ones(T, T).tril().view(1, 1, T, T)
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2s_published_weights_give_gpt2s_logits(prefix, tmp_path):
    """Read from a file by load: the shapes alone tell the size, heads have 64 channels."""
    model = tiny(torch.float32, vocab_size=50, n_embd=128, n_layer=3, block_size=20, tokenizer="gpt2")
    weights = {prefix + name: w for name, w in gpt2_weights(model).items()}
    if prefix:
        weights["lm_head.weight"] = model.wte.weight
    for legacy in (False, True):  # OpenAI's files are older than torch's zip format
        torch.save(weights, tmp_path / "w.bin", _use_new_zipfile_serialization=not legacy)
        loaded = GPT.load(tmp_path / "w.bin")
        assert loaded.config == model.config and loaded.config.n_head == 2
        tokens = torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded(tokens), model(tokens))


def test_from_gpt2_takes_other_heads_by_name():
    model = tiny(n_head=4)
    assert torch.equal(GPT.from_gpt2(gpt2_weights(model), n_head=4).double()(torch.tensor([[1, 2]])),
                       model.float().double()(torch.tensor([[1, 2]])))


def test_to_gpt2_has_the_published_names_and_shapes_and_from_gpt2_is_its_inverse():
    """The names and shapes of GPT-2's files, for 768 channels and 2 of the 12 layers; there and back bit for bit."""
    model = GPT(GPTConfig(50, 30, 2, 12, 768, "gpt2"))
    block = {"ln_1.weight": [768], "ln_1.bias": [768], "attn.c_attn.weight": [768, 2304], "attn.c_attn.bias": [2304],
             "attn.c_proj.weight": [768, 768], "attn.c_proj.bias": [768], "ln_2.weight": [768], "ln_2.bias": [768],
             "mlp.c_fc.weight": [768, 3072], "mlp.c_fc.bias": [3072], "mlp.c_proj.weight": [3072, 768], "mlp.c_proj.bias": [768]}
    published = {"wte.weight": [50, 768], "wpe.weight": [30, 768], "ln_f.weight": [768], "ln_f.bias": [768]}
    published |= {f"h.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    weights = model.to_gpt2()
    assert {name: list(w.shape) for name, w in weights.items()} == {"lm_head.weight": [50, 768]} | {
        "transformer." + name: shape for name, shape in published.items()}
    assert torch.equal(weights["transformer.h.1.mlp.c_fc.weight"], model.h[1].mlp.c_fc.weight.T)
    assert torch.equal(weights["lm_head.weight"], model.wte.weight)
    back = GPT.from_gpt2(weights)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    again = back.to_gpt2()
    assert list(again) == list(weights) and all(torch.equal(again[name], w) for name, w in weights.items())


def test_exported_weights_are_those_of_the_transformers_library():
    """Where that library is installed: strict loading, and its logits are ours."""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    model = tiny(torch.float32, vocab_size=50, block_size=20, n_layer=3, n_head=4, n_embd=32)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_layer=3, n_head=4, n_embd=32)).eval()
    theirs.load_state_dict(model.to_gpt2(), strict=True)
    tokens = torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(0))
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4 * model(tokens).abs().max()


def test_what_is_saved_is_loaded_with_its_sizes_and_the_tokenizers_name(tmp_path):
    model = tiny(torch.float32, tokenizer="toy", n_head=4)
    model.save(tmp_path / "m.pt")
    loaded = GPT.load(tmp_path / "m.pt")
    assert loaded.config == model.config and loaded.config.tokenizer == "toy"
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_weights_that_are_not_gpt2s_or_ours_are_refused_in_one_line(tmp_path):
    """Absurd configurations too: the tensors of the file decide before anything is built."""
    model = tiny(torch.float32)
    weights, path = gpt2_weights(model), tmp_path / "w.bin"
    missing, odd, saved = dict(weights), dict(weights), {"weights": model.to_gpt2(), "n_head": 2, "tokenizer": "toy"}
    del missing["h.1.ln_2.bias"]
    odd["h.0.mlp.c_fc.weight"] = torch.zeros(3, 3)
    absurd = [saved | change for change in (
        {"n_head": -2}, {"n_head": 2.0}, {"n_head": "2"}, {"n_head": 3}, {"extra": 1}, {"weights": {}}, {"weights": 3},
        {"weights": missing}, {"weights": odd}, {"weights": saved["weights"] | {"transformer.h.999.ln_1.weight": torch.zeros(8)}})]
    for wrong in (missing, odd, {}, [1, 2], torch.zeros(3), {"n_head": 2, "tokenizer": "toy"}, *absurd):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="w.bin: not the weights of a GPT or of GPT-2"):
            GPT.load(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_logits_of_the_cpu():
    model, tokens = tiny(torch.float32), torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.allclose(model(tokens), model.cuda()(tokens.cuda()).cpu(), atol=1e-4)
