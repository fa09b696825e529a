# SPDX-License-Identifier: MIT
"""GPT-2's network (Radford et al. 2019), small and from scratch: tokens in, logits out; sampling.

Shapes: B rows, T tokens, C channels, nh heads, hs = C / nh head size, V vocabulary.

Different from GPT-2 as published: no dropout. A policy that drops units and a reference that does
not would disagree before the first step, and the DPO loss would not start at ln 2. The names of the
weights are GPT-2's own.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 32  # longest row, in tokens
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"expected n_embd to be a multiple of n_head = {self.n_head}, "
                             f"got {self.n_embd}")


class Attention(nn.Module):
    """Causal self-attention: position t reads positions 0 … t and no later one."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers, four times as wide between them, applied to each position alone."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block: x + attention, then x + MLP."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
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
            elif name.endswith("c_proj.weight"):  # 2 n_layer of these add up in the residual stream
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5)
            elif "ln_" not in name:
                nn.init.normal_(p, std=0.02)

    def hidden(self, tokens):
        """tokens (B, T) -> the last layer's activations (B, T, C), before the output projection.

        Rows shorter than T are padded on the right, with any id, and need no attention mask: a
        position reads only what stands to its left, and padding stands to the right of every token.
        Raises ValueError if T exceeds config.block_size.
        """
        T, longest = tokens.shape[1], self.config.block_size
        if T > longest:
            raise ValueError(f"expected at most block_size = {longest} tokens, got {T}")
        x = self.wte(tokens) + self.wpe.weight[:T]  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def project(self, hidden):
        """Activations (..., C) -> logits (..., V)."""
        return F.linear(hidden, self.wte.weight)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V): at each position, for the token that comes next."""
        return self.project(self.hidden(tokens))

    @torch.no_grad()
    def generate(self, tokens, lengths, max_new_tokens, temperature, eos, generator=None):
        """Continue a batch of prompts of different lengths, each until EOS or max_new_tokens.

        tokens (B, T)    prompts, padded on the right with any id
        lengths (B,)     tokens in each prompt, ≥ 1
        temperature      1 samples from the model, 0 takes the likeliest token
        eos              the id that ends a row
        generator        torch.Generator on the model's device; None draws from the global one
        returns (tokens (B, T + max_new_tokens), lengths (B,)): row i is tokens[i, :lengths[i]], its
        prompt included and its EOS too if it came; after that every id is eos.
        """
        B, T = tokens.shape
        rows = torch.arange(B, device=tokens.device)
        tokens = F.pad(tokens, (0, max_new_tokens))
        tokens[torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]] = eos
        running = torch.ones(B, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            last = self.hidden(tokens[:, :lengths.max()])[rows, lengths - 1]  # (B, C)
            logits = self.project(last).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                p = (logits / temperature).softmax(-1)
                new = torch.multinomial(p, 1, generator=generator).squeeze(1)
            new[~running] = eos  # a finished row ends in EOS and is filled up with EOS
            tokens[rows, lengths] = new
            lengths = lengths + running
            running = running & (new != eos)
            if not running.any():
                break
        return tokens, lengths

    def sample(self, prompts, max_new_tokens, temperature, eos, generator=None, batch_size=1024):
        """A completion y ~ π(·|x) of each prompt: lists of ids in, lists of ids out, which end in
        EOS if it came in time. The options are those of generate."""
        completions, device = [], self.wte.weight.device
        for i in range(0, len(prompts), batch_size):
            rows = [torch.tensor(prompt) for prompt in prompts[i:i + batch_size]]
            lengths = torch.tensor([len(row) for row in rows], device=device)
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            tokens, ends = self.generate(tokens, lengths, max_new_tokens, temperature, eos,
                                         generator)
            completions += [row[start:end] for row, start, end in
                            zip(tokens.tolist(), lengths.tolist(), ends.tolist())]
        return completions
