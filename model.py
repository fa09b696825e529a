# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""GPT-2's network (Radford et al. 2019): tokens in, logits out; sampling; weights on disk.

B rows, T tokens, C channels, nh heads of size hs, V vocabulary, N scored positions.
There is no dropout. Dropout in the policy alone would move the first DPO loss away from ln 2.
"""
import json
import math
import os
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in GPT-2's files
GPT2_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}  # of the published models, by channels
GPT2_NETWORK = {  # fields of config.json that change the network, and supported values
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (True,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 256  # longest row, in tokens
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 64
    tokenizer: str = ""  # name of the tokenizer that made the ids

    def __post_init__(self):
        if not isinstance(self.n_head, int) or self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"expected n_head to divide n_embd = {self.n_embd}, got {self.n_head}")


class Attention(nn.Module):
    """Causal self-attention: each token attends to itself and to the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=-1)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if cache is not None:  # {this module: keys and values of all tokens so far}
            if self in cache:
                k = torch.cat([cache[self][0], k], dim=2)
                v = torch.cat([cache[self][1], v], dim=2)
            cache[self] = k, v
        # With earlier tokens in the cache, T is 1, and the new token attends to all tokens.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=(T == k.shape[2]))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm residual block: x + attention, then x + MLP. The MLP sees each position alone."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(OrderedDict(  # the names in GPT-2's published files
            c_fc=nn.Linear(C, 4 * C), gelu=nn.GELU("tanh"), c_proj=nn.Linear(4 * C, C)))

    def forward(self, x, cache):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer. Its output projection is the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):  # the residual stream sums 2 n_layer terms
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif "ln_" not in name:
                nn.init.normal_(p, std=0.02)

    def hidden(self, tokens, start=0, cache=None):
        """tokens (B, T) at positions from start on -> activations after the last norm (B, T, C).
        cache is {} at first and collects keys and values. In later calls T must be 1."""
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"expected at most {self.config.block_size} tokens, got {end}")
        x = self.wte(tokens) + self.wpe.weight[start:end]  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        return self.ln_f(x)

    def forward(self, tokens, scored=None):
        """tokens (B, T) -> logits (B, T, V). The logits at position t predict token t + 1.
        With scored, a mask (B, T): only the logits that predict a scored token, (N, V)."""
        hidden = self.hidden(tokens)
        if scored is not None:
            hidden = hidden[:, :-1][scored[:, 1:]]  # (N, C)
        return F.linear(hidden, self.wte.weight)

    @torch.no_grad()
    def sample(self, prompts, max_new_tokens, temperature, eos, generator=None):
        """One completion y ~ π(·|x) per prompt, as lists of ids, up to EOS or max_new_tokens.

        Temperature 1 samples from the model; 0 picks the most likely token. A generator must be on
        the model's device. Raises ValueError if a prompt is empty or too long, or if the
        temperature is neither 0 nor finite and at least 1e-6.
        """
        lengths = [len(prompt) for prompt in prompts]
        shortest, longest = min(lengths), max(lengths)
        if shortest < 1 or max_new_tokens < 1 or longest + max_new_tokens > self.config.block_size:
            raise ValueError("expected at least 1 token in a prompt and 1 new token, together at "
                             f"most {self.config.block_size}, got prompts of {shortest} to "
                             f"{longest} tokens and max_new_tokens = {max_new_tokens}")
        if not (temperature == 0 or 1e-6 <= temperature < math.inf):
            raise ValueError(f"expected temperature 0 or at least 1e-6, got {temperature}")
        device = self.wte.weight.device
        padded = torch.tensor([[*x, *[0] * (longest - len(x))] for x in prompts], device=device)
        length = torch.tensor(lengths, device=device)  # (B,)
        ended = torch.zeros_like(length, dtype=torch.bool)
        tokens, start, cache = padded[:, :shortest], 0, {}  # tokens from start on are not cached
        while not ended.all():  # all rows advance together
            hidden = self.hidden(tokens[:, start:], start, cache)[:, -1]  # (B, C)
            logits = F.linear(hidden, self.wte.weight).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                new = (logits / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]
            start = tokens.shape[1]  # position of the new token
            if start < longest:  # a longer prompt continues with its own token
                new = torch.where(start < length, padded[:, start], new)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            ended |= (start >= length) & (new == eos)
            ended |= start + 1 == length + max_new_tokens
        completions = [row[n:n + max_new_tokens] for row, n in zip(tokens.tolist(), lengths)]
        return [y[:y.index(eos) + 1] if eos in y else y for y in completions]

    @classmethod
    def from_gpt2(cls, weights, n_head=None, tokenizer="gpt2"):
        """A GPT from weights in GPT-2's published layout, {name: tensor}; n_head is not in them.
        Raises a ValueError that names the first tensor that does not fit."""
        masks = (".attn.bias", ".attn.masked_bias")  # old files contain the causal masks
        weights = {name.removeprefix("transformer."): w.T if name.endswith(TRANSPOSED) else w
                   for name, w in weights.items() if not name.endswith(masks)}
        for name in ("wte.weight", "wpe.weight"):
            if name not in weights or weights[name].dim() != 2:
                raise ValueError(f"not weights of GPT-2: expected a matrix {name}")
        head = weights.pop("lm_head.weight", weights["wte.weight"])
        if not torch.equal(head, weights["wte.weight"]):
            raise ValueError("lm_head.weight differs from wte.weight; in GPT-2 they are equal")
        (V, C), T = weights["wte.weight"].shape, len(weights["wpe.weight"])
        n_layer = sum(name.endswith("ln_1.weight") for name in weights)
        if n_head is None:
            n_head = GPT2_HEADS.get(C)
        if n_head is None:
            raise ValueError(f"n_head is not stored in weights with {C} channels: put the model's "
                             "config.json in the same folder, or give n_head")
        model = cls(GPTConfig(V, T, n_layer, n_head, C, tokenizer))
        expected = model.state_dict()
        for name in expected | weights:
            shapes = [tuple(w[name].shape) if name in w else None for w in (expected, weights)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name}: expected shape {shapes[0]}, got {shapes[1]}")
            if not (weights[name].is_floating_point() and weights[name].float().isfinite().all()):
                raise ValueError(f"{name}: expected finite float numbers")
        model.load_state_dict(weights)
        return model

    def to_gpt2(self):
        """The weights in GPT-2's published layout, {name: tensor}; from_gpt2 is the inverse."""
        return {"transformer." + name: (w.T if name.endswith(TRANSPOSED) else w).contiguous()
                for name, w in self.state_dict().items()}

    @classmethod
    def load(cls, path, n_head=None):
        """A GPT from a file that save wrote, or from GPT-2's pytorch_model.bin. The latter needs
        config.json beside it, a published width, or n_head. Raises ValueError or OSError."""
        weights, tokenizer, config = load_checkpoint(path), "gpt2", {}
        config_path = Path(path).with_name("config.json")
        if "weights" in weights:  # save wrote this file
            n_head, tokenizer = weights.get("n_head"), weights.get("tokenizer")
            weights = weights["weights"]
        elif config_path.exists():
            config = read_config(config_path)
            n_head = config["n_head"]
        if not isinstance(weights, dict) or not all(
                isinstance(name, str) and torch.is_tensor(w) and w.layout == torch.strided
                and not w.is_meta for name, w in weights.items()):
            raise ValueError(f"{path}: not the weights of a GPT")
        try:
            model = cls.from_gpt2(weights, n_head, tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        n_embd = config.get("n_embd", model.config.n_embd)
        if n_embd != model.config.n_embd:  # config.json belongs to another model
            raise ValueError(f"{config_path}: n_embd {n_embd!r:.60} does not fit {path}")
        return model

    def save(self, path):
        save_checkpoint(path, {"weights": self.to_gpt2(), "n_head": self.config.n_head,
                               "tokenizer": self.config.tokenizer})  # the arguments of from_gpt2


def read_config(path):
    """GPT-2's config.json as a dict. Raises ValueError if it describes another network."""
    try:
        config = {"n_head": 12} | json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, TypeError, ValueError):
        raise ValueError(f"{path}: expected a JSON object") from None
    for name, accepted in GPT2_NETWORK.items():
        if config.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{path}: expected {name} {accepted[0]!r}, got {config[name]!r:.60}")
    if type(config["n_head"]) is not int:  # True would be an int too
        raise ValueError(f"{path}: expected an integer n_head, got {config['n_head']!r:.60}")
    return config


def load_checkpoint(path):
    """The dict that torch.save wrote to path; code in the file is not run. Raises ValueError if the
    file is of another kind or damaged."""
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":
            raise ValueError(f"{path}: a safetensors file; the README shows how to convert it")
        try:
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise ValueError  # a checksum is wrong; torch.load does not look at them
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
            return saved if isinstance(saved, dict) else {}
        except Exception:  # torch.load raises many types for a damaged file
            raise ValueError(f"{path}: not a checkpoint of tensors, or damaged") from None


def save_checkpoint(path, content):
    """torch.save to a temporary file that replaces path. If it fails, the old file stays whole."""
    try:
        torch.save(content, f"{path}.tmp")
        if not zipfile.is_zipfile(f"{path}.tmp"):  # torch 2.6 misses an error at the end
            raise RuntimeError("the end of the file is missing")
    except RuntimeError as error:  # torch.save raises it if the disk is full
        raise OSError(f"{path} cannot be written; is the disk full? {error}") from None
    os.replace(f"{path}.tmp", path)
