"""model.py against a naive NumPy transformer, and sampling against the model's own probabilities."""
import math

import numpy as np
import pytest
import torch

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
    with pytest.raises(ValueError, match="expected n_embd to be a multiple of n_head = 3, got 8"):
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


def test_temperature_0_takes_the_argmax_of_every_step_in_ragged_batches():
    """50 prompts of one to five tokens in one batch continue as each does alone, by hand."""
    model, rng, expected = tiny(), np.random.default_rng(0), []
    prompts = [rng.integers(10, size=n).tolist() for n in rng.integers(1, 6, 50)]
    for prompt in prompts:
        row = list(prompt)
        while len(row) < len(prompt) + 6 and (row == prompt or row[-1] != EOS):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        expected.append(row)
    assert len({tuple(row[-3:]) for row in expected}) > 5  # the prompts do matter
    batch = torch.zeros(50, 5, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        batch[i, :len(prompt)] = torch.tensor(prompt)
    tokens, ends = model.generate(batch, torch.tensor([len(p) for p in prompts]), 6, 0, EOS)
    assert [row[:end] for row, end in zip(tokens.tolist(), ends.tolist())] == expected
    completions = [row[len(p):] for p, row in zip(prompts, expected)]
    assert model.sample(prompts, 6, 0, EOS, batch_size=7) == completions


def test_a_row_stops_at_eos_and_holds_nothing_but_eos_after_it():
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    tokens, ends = model.generate(torch.full((200, 2), 3), torch.full((200,), 2), 9, 1.0, EOS, generator)
    assert 2 < ends.min() and ends.max() == 11 and len(ends.unique()) > 4
    for row, end in zip(tokens.tolist(), ends.tolist()):
        assert EOS not in row[2:end - 1] and set(row[end:]) <= {EOS}
        assert row[end - 1] == EOS or end == 11


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_probabilities(temperature):
    """χ² of 20,000 samples over two tokens against softmax(logits / temperature), at p = 0.001."""
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    n = 20_000
    tokens, _ = model.generate(torch.full((n, 1), 3), torch.ones(n, dtype=torch.long), 2,
                               temperature, EOS, generator)
    with torch.no_grad():
        first = (model(torch.tensor([[3]]))[0, -1] / temperature).softmax(-1)
        second = (model(torch.tensor([[3, a] for a in range(11)]))[:, -1] / temperature).softmax(-1)
    second[EOS] = torch.eye(11, dtype=torch.float64)[EOS]  # after EOS comes EOS
    expected = n * (first[:, None] * second).flatten()
    counts = torch.bincount(tokens[:, 1] * 11 + tokens[:, 2], minlength=121)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_logits_of_the_cpu():
    model, tokens = tiny(torch.float32), torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.allclose(model(tokens), model.cuda()(tokens.cuda()).cpu(), atol=1e-4)
