"""model.py against a naive NumPy transformer, and its samples against its own probabilities."""
import json
import math

import numpy as np
import pytest
import torch

import data
from dpo import sequence_logps
from model import GPT, GPTConfig

EOS = 10


def tiny(dtype=torch.float64, **shape):
    """A GPT with large weights: at the initial values many faults would not show."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(**{"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8} | shape))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1 if name == "ln_f.bias" else 0.8)
    return model.to(dtype)


def naive_forward(model, row):
    """One row through GPT-2's equations, in NumPy with explicit loops for attention. There is no dropout."""
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


def test_a_row_longer_than_the_block_is_refused():
    model = tiny()
    assert model(torch.zeros(3, 12, dtype=torch.long)).shape == (3, 12, 11)
    with pytest.raises(ValueError, match="expected at most 12 tokens, got 13"):
        model(torch.zeros(1, 13, dtype=torch.long))


def test_initialisation_is_gpt2s():
    """Weights have std 0.02, and residual projections 0.02 / sqrt(2 n_layer). Biases are 0, norms 1.
    The output projection is the embedding, so it adds no weights."""
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


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_scores_rows_as_each_row_alone(seed):
    """sequence_logps(model(tokens, scored=mask), tokens, mask), gradients too, in float64 to 1e-12."""
    model, rng = tiny(), np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(11, size=rng.integers(low, high)).tolist()
    rows = [data.Row(draw(1, 6), draw(1, 7)) for _ in range(9)]
    tokens, mask = data.collate(rows)
    alone = []
    for prompt, completion in rows:
        one, scored = torch.tensor([prompt + completion]), torch.tensor([[False] * len(prompt) + [True] * len(completion)])
        alone.append(sequence_logps(model(one), one, scored))
    alone = torch.cat(alone)
    weights = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = lambda logps: torch.cat([g.flatten() for g in torch.autograd.grad((weights * logps).sum(), list(model.parameters()))])
    expected = gradient(alone)
    for logits in (model(tokens), model(tokens, scored=mask)):
        together = sequence_logps(logits, tokens, mask)
        assert together.dtype == torch.float64 and (together - alone).abs().max() < 1e-12 * alone.abs().max()
        assert (gradient(together) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_greedy_samples_of_ragged_batches_are_those_of_plain_forward_passes():
    """60 prompts of one to five tokens. Temperature 0 takes the most likely token of every step. An EOS in a prompt is a
    token like any other, also while shorter prompts of the batch are being continued."""
    model, rng, expected = tiny(), np.random.default_rng(0), []
    prompts = [rng.integers(11, size=n).tolist() for n in rng.integers(1, 6, 50)] + [[3, 1, EOS, EOS, n] for n in range(10)]
    for prompt in prompts:
        completion = []
        while len(completion) < 6 and EOS not in completion:
            completion.append(model(torch.tensor([prompt + completion]))[0, -1].argmax().item())
        expected.append(completion)
    assert len({tuple(y) for y in expected}) > 5 and min(map(len, expected)) < 6  # they differ, and some end early
    assert model.sample(prompts, 6, 0, EOS) == expected
    assert model.sample([np.array(x, np.int32) for x in prompts], 6, 0, EOS) == expected
    for prompt, completion in zip(prompts, expected):  # beside a short prompt, whose row has ended earlier
        assert model.sample([[3], prompt], 1, 0, EOS)[1] == completion[:1]


def test_sampling_ends_when_all_rows_have_ended_and_builds_no_graph(monkeypatch):
    model, steps, hidden = tiny(), [], GPT.hidden
    def watched(*arguments):
        steps.append(hidden(*arguments))
        return steps[-1]
    monkeypatch.setattr(GPT, "hidden", watched)
    longest = max(map(len, model.sample([[3], [1], [4]], 9, 0, EOS)))
    assert len(steps) == longest and not any(step.requires_grad for step in steps)


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


@pytest.mark.parametrize("prompts, max_new_tokens, message", [
    ([[1], [1] * 9], 4, "together at most 12; got 2 of 1 to 9 and max_new_tokens = 4"),
    ([[1] * 12], 1, "got 1 of 12 to 12"), ([[1]], 0, "max_new_tokens = 0"),
    ([[3, 1], []], 3, "got 2 of 0 to 2"), ([], 3, "expected at least one prompt.* got 0 of")],
    ids=["too long", "block is full", "no new token", "empty prompt", "no prompt"])
def test_prompts_without_a_token_or_without_room_are_refused(prompts, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        tiny().sample(prompts, max_new_tokens, 1.0, EOS)
    assert len(tiny().sample([[1] * 8], 4, 0, EOS)[0]) <= 4  # it fills the block exactly


@pytest.mark.parametrize("temperature", [-1, -1e-9, 1e-45, math.nan, math.inf, -math.inf])
def test_a_temperature_that_is_negative_tiny_or_not_finite_is_refused(temperature):
    with pytest.raises(ValueError, match=f"expected temperature 0 or a finite number of at least 1e-6, got {temperature}"):
        tiny().sample([[1]], 3, temperature, EOS)


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_extreme_temperatures_sample_valid_tokens(temperature):
    model = tiny(torch.float32)
    samples = model.sample([[1]] * 50, 3, temperature, EOS, torch.Generator().manual_seed(0))
    assert all(0 <= token < 11 for y in samples for token in y)
    assert (temperature > 1) == (len(set(map(tuple, samples))) > 10)  # almost greedy, or almost uniform


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


def load(folder, weights, config='{"n_head": 2}'):
    """GPT.load of a file with these weights beside a config.json, a text or bytes."""
    torch.save(weights, folder / "w.bin")
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    return GPT.load(folder / "w.bin")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2s_published_weights_give_gpt2s_logits(prefix, tmp_path):
    """The tensors determine all sizes but the number of heads. config.json has it, and may begin with a byte order mark."""
    model = tiny(torch.float32, vocab_size=50, n_embd=48, n_head=3, n_layer=3, block_size=20, tokenizer="gpt2")
    weights = {prefix + name: w for name, w in gpt2_weights(model).items()}
    if prefix:
        weights["lm_head.weight"] = model.wte.weight
    (tmp_path / "config.json").write_text('\ufeff{"n_head": 3, "n_layer": 3, "n_embd": 48, "n_ctx": 1024}', encoding="utf-8")
    for legacy in (False, True):  # OpenAI's files are older than torch's zip format
        torch.save(weights, tmp_path / "w.bin", _use_new_zipfile_serialization=not legacy)
        loaded, tokens = GPT.load(tmp_path / "w.bin"), torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(0))
        assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_any_precision_give_a_float32_model_that_shares_no_memory_with_them(dtype):
    """In a bfloat16 model, a step of the rate 1e-6 would not move most weights."""
    source = {name: w.to(dtype) if "masked" not in name and ".attn.bias" not in name else w
              for name, w in gpt2_weights(tiny(torch.float32)).items()}
    model = GPT.from_gpt2(source, 2)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    copied = {name.removeprefix("transformer."): w.clone() for name, w in model.to_gpt2().items()}
    assert len(copied) == 28 and all(torch.equal(w, source[name].float()) for name, w in copied.items())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(w, source[name].float()) for name, w in copied.items())


def test_the_number_of_heads_is_that_of_config_json_and_never_guessed(tmp_path):
    weights, tokens = gpt2_weights(tiny(torch.float32, n_embd=64, n_head=4)), torch.tensor([[3, 1, 4, 1, 5]])
    logits = []
    for n_head in (1, 4, 16):
        logits.append(load(tmp_path, weights, '{"n_head": %d}' % n_head)(tokens))
        assert torch.equal(logits[-1], GPT.from_gpt2(weights, n_head)(tokens))
    assert (logits[0] - logits[1]).abs().max() > 0.1 < (logits[1] - logits[2]).abs().max()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="^not a checkpoint of GPT.save; pytorch_model.bin needs its config.json in the same folder, "
                                         "and there is no .*config.json$"):
        GPT.load(tmp_path / "w.bin")


@pytest.mark.parametrize("field, value, accepted", [
    ("model_type", "gpt_neo", ["gpt2"]), ("layer_norm_epsilon", 1e-6, [1e-5]), ("tie_word_embeddings", False, [True]),
    ("activation_function", "relu", ["gelu_new", "gelu_pytorch_tanh"]), ("activation_function", "gelu", []),  # erf, not tanh
    ("scale_attn_weights", False, [True]), ("scale_attn_by_inverse_layer_idx", True, [False]), ("add_cross_attention", True, [False])])
def test_a_config_json_of_another_network_is_refused_by_its_field(field, value, accepted, tmp_path):
    weights = tiny(torch.float32).to_gpt2()
    for good in accepted:
        assert load(tmp_path, weights, json.dumps({"n_head": 2, field: good})).config.n_head == 2
    with pytest.raises(ValueError, match=f"config.json: expected {field} .*, got {value!r}$"):
        load(tmp_path, weights, json.dumps({"n_head": 2, field: value}))


OBJECT, HEADS = "config.json: expected a JSON object with n_head$", "w.bin: expected an integer n_head that divides n_embd = 8, got "


@pytest.mark.parametrize("content, message", [(content, OBJECT) for content in (
    "", '["n_head"]', "null", "{", '"n_head"', "[" * 10**5, "{}", '{"n_layer": 2, "n_embd": 8}', b"\xff\xfe{")] + [
    ('{"n_head": %s}' % value, f"{HEADS}{got}$") for value, got in (
        ("2.0", "2.0"), ("true", "True"), ('"2"', "'2'"), ("1e999", "inf"), ("null", "None"), ("0", "0"), ("-2", "-2"), ("3", "3"))] + [
    ('{"n_head": 2, "n_embd": 768}', "w.bin: config.json has n_embd 768, but the weights have 8"),
    ('{"n_head": 2, "n_embd": 8, "n_layer": 12}', "w.bin: config.json has n_layer 12, but the weights have 2")])
def test_a_config_json_that_does_not_fit_is_refused(content, message, tmp_path):
    """Also that of another model, such as the heads of gpt2-medium for the weights of gpt2."""
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tiny(torch.float32).to_gpt2(), content)


def test_to_gpt2_has_the_published_names_shapes_and_layout_and_from_gpt2_is_its_inverse():
    """Names and shapes of GPT-2's files, for 768 channels and 2 of the 12 layers. Tensors share no memory."""
    model = GPT(GPTConfig(50, 30, 2, 12, 768, "gpt2"))
    block = {"ln_1.weight": [768], "ln_1.bias": [768], "attn.c_attn.weight": [768, 2304], "attn.c_attn.bias": [2304],
             "attn.c_proj.weight": [768, 768], "attn.c_proj.bias": [768], "ln_2.weight": [768], "ln_2.bias": [768],
             "mlp.c_fc.weight": [768, 3072], "mlp.c_fc.bias": [3072], "mlp.c_proj.weight": [3072, 768], "mlp.c_proj.bias": [768]}
    published = {"wte.weight": [50, 768], "wpe.weight": [30, 768], "ln_f.weight": [768], "ln_f.bias": [768]}
    published |= {f"h.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    weights = model.to_gpt2()
    assert {name: list(w.shape) for name, w in weights.items()} == {"transformer." + name: shape for name, shape in published.items()}
    assert all(w.is_contiguous() for w in weights.values()) and len({w.data_ptr() for w in weights.values()}) == len(weights)
    assert torch.equal(weights["transformer.h.1.mlp.c_fc.weight"], model.h[1].mlp.c_fc.weight.T)
    back = GPT.from_gpt2(weights, 12)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("heads, width", [(4, 32), (3, 96)])
def test_exported_weights_give_the_same_logits_in_the_transformers_library(heads, width):
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    model = tiny(torch.float32, vocab_size=50, block_size=20, n_layer=3, n_head=heads, n_embd=width)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_layer=3, n_head=heads, n_embd=width)).eval()
    result = theirs.load_state_dict(model.to_gpt2(), strict=False)
    theirs.tie_weights()
    assert result.missing_keys == ["lm_head.weight"] and not result.unexpected_keys
    tokens = torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(0))
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4 * model(tokens).abs().max()


def test_a_safetensors_file_is_refused_by_its_name(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the safetensors library is not installed")
    safetensors.save_file(tiny(torch.float32).to_gpt2(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="m.safetensors: a safetensors file; the README shows how to convert it"):
        GPT.load(tmp_path / "m.safetensors")


def test_a_saved_model_loads_with_its_sizes_and_tokenizer(tmp_path, monkeypatch):
    """Its file has the number of heads, so a config.json beside it is not read. It loads to the CPU, wherever it was saved."""
    model = tiny(torch.float32, tokenizer="toy", n_head=4)
    model.save(tmp_path / "m.pt")
    (tmp_path / "config.json").write_text('{"n_head": 2, "n_layer": 7}')
    options, torch_load = {}, torch.load
    monkeypatch.setattr(torch, "load", lambda *arguments, **given: options.update(given) or torch_load(*arguments, **given))
    loaded = GPT.load(str(tmp_path / "m.pt"))
    assert options == {"map_location": "cpu", "weights_only": True}
    assert loaded.config == model.config and loaded.config.tokenizer == "toy" and loaded.config.n_head == 4
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["", "none.pt", "."])
def test_a_folder_or_a_missing_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{name}: expected a file, such as out/sft.pt or pytorch_model.bin$"):
        GPT.load(name)


def wrong_files():
    """(what is wrong, a file's content, what the error says)"""
    weights = gpt2_weights(tiny(torch.float32))
    without = lambda part: {name: w for name, w in weights.items() if part not in name}
    renamed = lambda prefix: {prefix + name: w for name, w in weights.items()}
    first = "expected a GPT-2 model with a tensor wte.weight, but the first names are "
    for part in ("wpe.weight", "h.1.ln_2.bias", "ln_f.weight"):
        yield "without " + part, without(part), f'Missing key.*"{part}"'
    yield "value head", weights | {"v_head.summary.weight": torch.zeros(1, 8)}, 'Unexpected key.*"v_head.summary.weight"'
    yield "shape", weights | {"h.0.mlp.c_fc.bias": torch.zeros(3)}, r"h.0.mlp.c_fc.bias.*\[3\].*\[32\]"
    yield "not transposed", weights | {"h.0.mlp.c_fc.weight": torch.zeros(32, 8)}, r"h.0.mlp.c_fc.weight.*\[8, 32\].*\[32, 8\]"
    yield "first shard", {name: w for name, w in without("ln_f").items() if "h.1." not in name}, 'Missing key.*"ln_f.weight"'
    yield "second shard", {name: w for name, w in weights.items() if "h.1." in name}, first + r"\['h.1.ln_1.weight', 'h.1.ln_1.bias', "
    for prefix in ("module.", "_orig_mod.", "model.transformer."):  # of DataParallel, torch.compile and wrappers
        yield prefix, renamed(prefix), rf"{first}\['{prefix}wte.weight', '{prefix}wpe.weight', '{prefix}h.0.ln_1.weight'\]"
    yield "nanoGPT", {"model": renamed("transformer."), "optimizer": {}, "model_args": {"n_head": 2}, "iter_num": 3}, (
        first + r"\['model', 'optimizer', 'model_args'\]")
    yield "list", [1, 2], first + r"\[\]"
    yield "a tensor named weights", {"weights": torch.zeros(3), "bias": torch.zeros(3)}, first + r"\['weights', 'bias'\]"
    yield "vocabulary", {"!": 0, "x" * 1000: 1}, first + r"\['!', 'x{185,}$"
    yield "not a tensor", weights | {"ln_f.bias": [0.0] * 8}, "expected a tensor for every name"
    yield "number as name", weights | {1: torch.zeros(8)}, "expected a tensor for every name"
    yield "output projection", weights | {"lm_head.weight": 2 * weights["wte.weight"]}, "lm_head.weight differs from wte.weight"
    for value in (math.nan, math.inf, -math.inf):
        changed = weights["h.1.attn.c_proj.weight"].clone()
        changed[7, 0] = value
        yield f"{value}", weights | {"h.1.attn.c_proj.weight": changed}, "h.1.attn.c_proj.weight: expected finite numbers$"


@pytest.mark.parametrize("content, message", [pytest.param(*case[1:], id=case[0]) for case in wrong_files()])
def test_a_file_that_does_not_fit_is_refused_in_one_line_that_says_what_it_has(content, message, tmp_path):
    """wte.weight is looked for first, so the message about another kind of file does not depend on config.json."""
    if "first names" in message:
        torch.save(content, tmp_path / "w.bin")
        with pytest.raises(ValueError, match=f"^{tmp_path}/w.bin: {message}"):
            GPT.load(tmp_path / "w.bin")
    with pytest.raises(ValueError, match=f"^{tmp_path}/w.bin: .*{message}") as refused:
        load(tmp_path, content)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= len(f"{tmp_path}/w.bin: ") + 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_logits_of_the_cpu():
    model, tokens = tiny(torch.float32), torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.allclose(model(tokens), model.cuda()(tokens.cuda()).cpu(), atol=1e-4)
