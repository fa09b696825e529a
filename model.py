# SPDX-License-Identifier: MIT
"""GPT-2's network (Radford et al. 2019), small and from scratch: tokens in, logits out; sampling.

B rows, T tokens, S keys, C channels, nh heads of size hs, V vocabulary, K completions, N positions.
No dropout: a policy that drops units and a reference that does not would disagree before the
first step, and the DPO loss would not start at ln 2.
"""
import os
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

MAX_TOKENS = 2**12  # in a batch of scoring; of sampling, twice as many
MAX_LOGITS = 2**24  # that completion_logps makes at once: parts keep the peak of memory low
TRANSPOSED = "c_attn.weight", "c_proj.weight", "c_fc.weight"  # in GPT-2's published files


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 256  # longest text, in tokens
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 64
    tokenizer: str = ""  # the name of the vocabulary that the ids belong to

    def __post_init__(self):
        if type(self.n_head) is not int or self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"expected n_head to divide n_embd = {self.n_embd}, got {self.n_head}")


class Attention(nn.Module):
    """Self-attention: a token attends to itself and those before it, or as attn_mask says."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, attn_mask, cache):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=-1))
        if cache is not None:  # keyed by layer: keys and values of all tokens so far
            if self in cache:
                k, v = torch.cat([cache[self][0], k], 2), torch.cat([cache[self][1], v], 2)
            cache[self] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=attn_mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm residual block: x + attention, then x + MLP, which sees each position alone."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(C, 4 * C), gelu=nn.GELU("tanh"), c_proj=nn.Linear(4 * C, C)))

    def forward(self, x, attn_mask, cache):
        x = x + self.attn(self.ln_1(x), attn_mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer. The output projection is the token embedding itself."""

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
            elif "ln_" not in name:  # the residual stream is a sum of 2 n_layer outputs of c_proj
                summands = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / summands ** 0.5)

    def hidden(self, tokens, positions=None, attn_mask=None, cache=None):
        """tokens (B, T) -> the last layer's activations (B, T, C), before the output projection.

        positions (B, T)        of each token in its text; None counts from 0
        attn_mask (B, 1, T, S)  True where token t may attend to s; None: to itself and all before
        cache                   keys and values so far, {} at first; then give the two above as well
        """
        T, longest = tokens.shape[1], self.config.block_size
        if positions is None and T > longest:
            raise ValueError(f"expected at most block_size = {longest} tokens, got {T}")
        x = self.wte(tokens) + (self.wpe.weight[:T] if positions is None else self.wpe(positions))
        for block in self.h:
            x = block(x, attn_mask, cache)  # (B, T, C)
        return self.ln_f(x)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V): at each position, for the token that comes next."""
        return F.linear(self.hidden(tokens), self.wte.weight)

    def completion_logps(self, tokens, positions, segments):
        """log π(y|x) of each completion in a batch of data.collate, three (B, T): (B, K), nats.

        What dpo.sequence_logps gives for each in a row of its own, for less work: a prompt runs
        once, and only positions that predict a scored token are projected onto the vocabulary.
        """
        B, K = len(tokens), int(segments.max())
        query, key = segments[:, None, :, None], segments[:, None, None, :]
        attn_mask = ((key == 0) | (key == query)).tril() if K > 1 else None  # (B, 1, T, T)
        hidden = self.hidden(tokens, positions, attn_mask)
        # The activations at position t predict the token at t + 1.
        scored = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
        row, t = scored.nonzero(as_tuple=True)  # (N,) each
        n, logps = max(1, MAX_LOGITS // self.config.vocab_size), []
        for part, y in zip(hidden[row, t].split(n), tokens[row, t + 1].split(n)):
            logits = F.linear(part, self.wte.weight)  # (n, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # as in dpo.py
            logps.append(-F.cross_entropy(logits, y, reduction="none"))  # (n,)
        logps = torch.cat(logps)  # (N,)
        completion = row * K + segments[row, t + 1] - 1
        return logps.new_zeros(B * K).index_add(0, completion, logps).view(B, K)

    @torch.no_grad()
    def sample(self, prompts, max_new_tokens, temperature, eos, generator=None):
        """A completion y ~ π(·|x) of each prompt, lists of ids in and out, until EOS or
        max_new_tokens. Temperature 1 samples from the model, 0 takes the likeliest token; a
        generator must be on the model's device."""
        longest, device = max(map(len, prompts)) + max_new_tokens, self.wte.weight.device
        if max_new_tokens < 1 or longest > self.config.block_size:
            raise ValueError(f"expected a prompt and 1 or more new tokens to fit into block_size = "
                             f"{self.config.block_size}, got {longest}, {max_new_tokens} new")
        completions, n = [], max(1, 2 * MAX_TOKENS // longest)
        for i in range(0, len(prompts), n):
            rows = [torch.tensor(prompt, device=device) for prompt in prompts[i:i + n]]
            lengths = torch.tensor([len(row) for row in rows], device=device)  # (B,)
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
            real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]  # no padding
            cache, drawn, ended = {}, [], torch.zeros_like(lengths, dtype=torch.bool)
            hidden = self.hidden(tokens, cache=cache)[range(len(rows)), lengths - 1]  # (B, C)
            while True:
                logits = F.linear(hidden, self.wte.weight).float()  # (B, V)
                drawn.append(logits.argmax(-1) if temperature == 0 else torch.multinomial(
                    (logits / temperature).softmax(-1), 1, generator=generator).squeeze(1))
                ended |= drawn[-1] == eos
                if ended.all() or len(drawn) == max_new_tokens:
                    break
                real = F.pad(real, (0, 1), value=True)  # from here on, one token a row is run
                positions = lengths[:, None] + len(drawn) - 1
                hidden = self.hidden(drawn[-1][:, None], positions, real[:, None, None], cache)
                hidden = hidden[:, 0]
            for y in torch.stack(drawn, 1).tolist():
                completions.append(y[:y.index(eos) + 1] if eos in y else y)
        return completions

    @classmethod
    def from_gpt2(cls, weights, n_head=None, tokenizer="gpt2"):
        """A GPT from weights as GPT-2's are published, {name: tensor}: matrices are transposed
        there, and causal masks and lm_head, which is wte again, may be saved too. Its sizes are
        those of the weights; n_head defaults to GPT-2's heads of 64 channels."""
        extra = ".attn.bias", ".attn.masked_bias", "lm_head.weight"
        weights = {name.removeprefix("transformer."): w.T if name.endswith(TRANSPOSED) else w
                   for name, w in weights.items() if not name.endswith(extra)}
        (V, C), T = weights["wte.weight"].shape, len(weights["wpe.weight"])
        n_layer = sum(name.endswith("ln_1.weight") for name in weights)
        model = cls(GPTConfig(V, T, n_layer, n_head or max(1, C // 64), C, tokenizer))
        model.load_state_dict(weights)
        return model

    def to_gpt2(self):
        """The weights in GPT-2's published layout; from_gpt2(weights, n_head) is the inverse."""
        weights = {"transformer." + name: w.T.contiguous() if name.endswith(TRANSPOSED) else w
                   for name, w in self.state_dict().items()}
        return weights | {"lm_head.weight": weights["transformer.wte.weight"]}

    @classmethod
    def load(cls, path):
        """A model from what save wrote, or from GPT-2's pytorch_model.bin. Else ValueError."""
        saved = load_checkpoint(path)
        try:
            return cls.from_gpt2(**saved) if "weights" in saved else cls.from_gpt2(saved)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"{path}: not the weights of a GPT or of GPT-2") from None

    def save(self, path):
        save_checkpoint(path, {"weights": self.to_gpt2(), "n_head": self.config.n_head,
                               "tokenizer": self.config.tokenizer})  # what from_gpt2 takes


def load_checkpoint(path):
    """The dict that torch.save wrote to path. Runs no code from it; ValueError if damaged."""
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():  # torch checks no sums
                raise ValueError
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
            return saved if isinstance(saved, dict) else {}
        except Exception:
            raise ValueError(f"{path}: not a checkpoint, damaged, or larger than memory") from None


def save_checkpoint(path, content):
    """torch.save, whole or not at all: after a kill or on a full disk, what was there stays."""
    try:
        torch.save(content, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except RuntimeError:  # torch's, whatever went wrong
        raise OSError(f"{path} cannot be written; is the disk full?") from None
