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
from torch.nn.utils.rnn import pad_sequence

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in GPT-2's files
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
        if type(self.n_head) is not int or self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"expected an integer n_head that divides n_embd = {self.n_embd}, got "
                             f"{self.n_head!r:.60}")


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
        # to (B, nh, T, hs)
        q, k, v = (x.view(B, T, self.n_head, -1).transpose(1, 2) for x in (q, k, v))
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
    def sample(self, prompt_ids, max_new_tokens, temperature, eos, generator=None):
        """One completion y ~ π(·|x) per prompt, as lists of ids, up to EOS or max_new_tokens.

        prompt_ids is a list of lists of ids. Temperature 1 samples from the model, and 0 picks the
        most likely token. A generator must be on the model's device. Raises ValueError if a prompt
        is empty or too long, or if the temperature is neither 0 nor finite and at least 1e-6.
        """
        lengths = [len(ids) for ids in prompt_ids]
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        if shortest < 1 or max_new_tokens < 1 or longest + max_new_tokens > self.config.block_size:
            raise ValueError("expected at least one prompt, of at least 1 token, and 1 new token, "
                             f"together at most {self.config.block_size}; got {len(lengths)} of "
                             f"{shortest} to {longest} and max_new_tokens = {max_new_tokens}")
        if not (temperature == 0 or 1e-6 <= temperature < math.inf):
            raise ValueError("expected temperature 0 or a finite number of at least 1e-6, got "
                             f"{temperature}")
        device = self.wte.weight.device
        rows = [torch.tensor(ids, device=device) for ids in prompt_ids]
        padded = pad_sequence(rows, batch_first=True)
        length = torch.tensor(lengths, device=device)  # (B,)
        ended = torch.zeros_like(length, dtype=torch.bool)
        tokens, start, cache = padded[:, :shortest], 0, {}  # start: first token not in the cache
        while not ended.all():  # all rows advance together
            hidden = self.hidden(tokens[:, start:], start, cache)[:, -1]  # (B, C)
            logits = F.linear(hidden, self.wte.weight).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                new = (logits / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]
            start = tokens.shape[1]  # position of the new token, the only one not in the cache
            if start < longest:  # a longer prompt continues with its own token
                new = torch.where(start < length, padded[:, start], new)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            ended |= (start >= length) & (new == eos) | (start + 1 == length + max_new_tokens)
        completions = [row[n:n + max_new_tokens] for row, n in zip(tokens.tolist(), lengths)]
        return [y[:y.index(eos) + 1] if eos in y else y for y in completions]

    @classmethod
    def from_gpt2(cls, weights, n_head, tokenizer="gpt2"):
        """A GPT from weights in GPT-2's published layout, {name: tensor}; n_head is not in them.
        Raises KeyError without wte.weight, and ValueError if another tensor does not fit."""
        masks = (".attn.bias", ".attn.masked_bias")  # old files contain the causal masks
        weights = {name.removeprefix("transformer."): w.T if name.endswith(TRANSPOSED) else w
                   for name, w in weights.items() if not name.endswith(masks)}
        head = weights.pop("lm_head.weight", weights["wte.weight"])
        if not torch.equal(head, weights["wte.weight"]):
            raise ValueError("lm_head.weight differs from wte.weight; in GPT-2 they are equal")
        n_layer = sum(name.endswith("ln_1.weight") for name in weights)
        T = len(weights.get("wpe.weight", head))  # if it is missing, load_state_dict says so
        model = cls(GPTConfig(len(head), T, n_layer, n_head, head.shape[-1], tokenizer))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:  # it lists what is missing, unknown or of another shape
            raise ValueError(f"{' '.join(str(error).split()):.300}") from None
        for name, p in model.named_parameters():
            if not p.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers")
        return model

    def to_gpt2(self):
        """The weights in GPT-2's published layout, {name: tensor}; from_gpt2 is the inverse."""
        return {"transformer." + name: (w.T if name.endswith(TRANSPOSED) else w).contiguous()
                for name, w in self.state_dict().items()}

    @classmethod
    def load(cls, path):
        """A GPT from a file that save wrote, or from GPT-2's pytorch_model.bin with config.json in
        the same folder. Raises ValueError or OSError."""
        if os.path.isdir(path) or not os.path.exists(path):
            raise ValueError(f"{path}: expected a file, such as out/sft.pt or pytorch_model.bin")
        saved = load_checkpoint(path)
        weights, config = saved.get("weights"), saved
        if not isinstance(weights, dict):  # save did not write this file
            weights, config = saved, None
        if "wte.weight" not in weights and "transformer.wte.weight" not in weights:
            raise ValueError(f"{path}: expected a GPT-2 model with a tensor wte.weight, but the "
                             f"first names are {list(weights)[:3]!r:.200}")
        if not all(isinstance(name, str) and torch.is_tensor(w) for name, w in weights.items()):
            raise ValueError(f"{path}: expected a tensor for every name")
        if config is None:
            config = read_config(Path(path).with_name("config.json"))
        try:
            model = cls.from_gpt2(weights, config.get("n_head"), config.get("tokenizer", "gpt2"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name in ("n_layer", "n_embd"):  # config.json of another model has a wrong n_head
            if config.get(name, getattr(model.config, name)) != getattr(model.config, name):
                raise ValueError(f"{path}: config.json has {name} {config[name]!r:.60}, but the "
                                 f"weights have {getattr(model.config, name)}")
        return model

    def save(self, path):
        save_checkpoint(path, {"weights": self.to_gpt2(), "n_head": self.config.n_head,
                               "tokenizer": self.config.tokenizer})  # the arguments of from_gpt2


def read_config(path):
    """GPT-2's config.json as a dict. Raises ValueError if it is missing, without n_head, or of
    another network."""
    if not path.exists():
        raise ValueError(f"not a checkpoint of GPT.save; pytorch_model.bin needs its config.json "
                         f"in the same folder, and there is no {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a BOM
    except (RecursionError, ValueError):
        config = None
    if not isinstance(config, dict) or "n_head" not in config:
        raise ValueError(f"{path}: expected a JSON object with n_head")
    for name, accepted in GPT2_NETWORK.items():
        if config.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{path}: expected {name} {accepted[0]!r}, got {config[name]!r:.60}")
    return config


def load_checkpoint(path):
    """The dict that torch.save wrote to path; code in the file is not run. Raises ValueError if the
    file is of another kind or damaged."""
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":  # 8 bytes with the length of a JSON header, which follows
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
        if not zipfile.is_zipfile(f"{path}.tmp"):  # torch 2.6 misses an error in the last bytes
            raise RuntimeError("the end of the file is missing")
    except RuntimeError as error:  # torch.save raises it if the disk is full
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written; is the disk full? {error}") from None
    os.replace(f"{path}.tmp", path)
