# SPDX-License-Identifier: MIT
"""GPT-2's network (Radford et al. 2019), small and from scratch: tokens in, logits out; sampling.

Shapes: B rows, T tokens, C channels, nh heads, hs = C / nh head size, V vocabulary.

Different from GPT-2 as published: no dropout. A policy that drops units and a reference that does
not would disagree before the first step, and the DPO loss would not start at ln 2. The names of the
weights are GPT-2's own.
"""
import math
import os
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TOKENS_AT_ONCE = 2**13  # in a batch of sampling or scoring
LOGITS_AT_ONCE = 2**26  # 256 MiB in float32


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
    """Causal self-attention: position t reads positions 0 … t, or those that reads leaves it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, reads):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, reads, is_causal=reads is None)
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

    def forward(self, x, reads):
        x = x + self.attn(self.ln_1(x), reads)
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
            elif "ln_" not in name:  # 2 n_layer of the c_proj add up in the residual stream
                summands = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / summands ** 0.5)

    def hidden(self, tokens, positions=None, answers=None):
        """tokens (B, T) -> the last layer's activations (B, T, C), before the output projection.

        positions (B, T)  of each token in its text; None counts from 0
        answers (B, T)    where a prompt's answers stand side by side, 0 on the prompt and k on the
                          k-th: a token then reads the prompt and its own answer, and no other
        Right padding needs no mask: it stands to the right of every token.
        """
        T, longest = tokens.shape[1], self.config.block_size
        if positions is None and T > longest:
            raise ValueError(f"expected at most block_size = {longest} tokens, got {T}")
        reads = None
        if answers is not None:
            of = answers[:, None, :, None]  # (B, 1, T, 1), its transpose is that of the tokens read
            reads = ((of.mT == 0) | (of.mT == of)).tril()  # (B, 1, T, T)
        x = self.wte(tokens) + (self.wpe.weight[:T] if positions is None else self.wpe(positions))
        for block in self.h:
            x = block(x, reads)  # (B, T, C)
        return self.ln_f(x)

    def project(self, hidden):
        """Activations (..., C) -> logits (..., V)."""
        return F.linear(hidden, self.wte.weight)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V): at each position, for the token that comes next."""
        return self.project(self.hidden(tokens))

    def answer_logps(self, tokens, positions, answers, sources):
        """log π(y|x) of every answer in a batch from data.collate, four (B, T): (B, K), nats.

        What dpo.sequence_logps gives for each answer in a row of its own, for less work: a prompt
        runs once, and only positions that predict a scored token reach the vocabulary. Where their
        logits are too many they come in parts, and again in parts when going backward.
        """
        B, K = len(tokens), int(answers.max())
        row, t = answers.nonzero(as_tuple=True)  # (N,) each: the scored tokens
        hidden = self.hidden(tokens, positions, answers if K > 1 else None)[row, sources[row, t]]
        n = math.ceil(len(row) * self.config.vocab_size / LOGITS_AT_ONCE)
        logps = torch.cat([checkpoint(self.token_logps, *part, use_reentrant=False) if n > 1 else
                           self.token_logps(*part)
                           for part in zip(hidden.chunk(n), tokens[row, t].chunk(n))])  # (N,)
        return logps.new_zeros(B * K).index_add(0, row * K + answers[row, t] - 1, logps).view(B, K)

    def token_logps(self, hidden, tokens):
        """Log-probabilities of tokens (N,) after activations (N, C): (N,), nats, float32."""
        logits = self.project(hidden)  # (N, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 sums err
        return -F.cross_entropy(logits, tokens, reduction="none")

    @torch.no_grad()
    def sample(self, prompts, max_new_tokens, temperature, eos, generator=None):
        """Continue each prompt until EOS or max_new_tokens: a completion y ~ π(·|x) of each.

        prompts          lists of ids, of one token or more
        temperature      1 samples from the model, 0 takes the likeliest token
        eos              the id that ends a completion
        generator        torch.Generator on the model's device; None draws from the global one
        returns lists of ids without the prompts, which end in EOS if it came in time
        """
        completions, device = [], self.wte.weight.device
        n = max(1, TOKENS_AT_ONCE // (max(map(len, prompts)) + max_new_tokens))
        for i in range(0, len(prompts), n):
            rows = [torch.tensor(prompt) for prompt in prompts[i:i + n]]
            starts = ends = torch.tensor([len(row) for row in rows], device=device)  # (B,)
            b, running = torch.arange(len(rows), device=device), torch.ones_like(ends)
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            tokens = F.pad(tokens, (0, max_new_tokens))
            for _ in range(max_new_tokens):
                last = self.hidden(tokens[:, :ends.max()])[b, ends - 1]  # (B, C)
                logits = self.project(last).float()  # (B, V)
                new = logits.argmax(-1) if temperature == 0 else torch.multinomial(
                    (logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
                tokens[b, ends] = new  # in a finished row it stands past the end and is never read
                ends = ends + running
                running = running * (new != eos)
                if not running.any():
                    break
            completions += [row[start:end] for row, start, end in
                            zip(tokens.tolist(), starts.tolist(), ends.tolist())]
        return completions

    @classmethod
    def from_gpt2(cls, weights, n_head=None):
        """GPT-2 in any of its four sizes, from its weights as published: {name: tensor}.

        There matrices are transposed, names may begin with "transformer.", and causal masks and
        lm_head, which is wte again, are saved too. n_head defaults to GPT-2's heads of 64 channels.
        """
        transposed = "c_attn.weight", "c_proj.weight", "c_fc.weight"
        extra = ".attn.bias", ".attn.masked_bias", "lm_head.weight"
        weights = {name.removeprefix("transformer."): w.T if name.endswith(transposed) else w
                   for name, w in weights.items() if not name.endswith(extra)}
        (V, C), T = weights["wte.weight"].shape, len(weights["wpe.weight"])
        n_layer = sum(name.endswith("ln_1.weight") for name in weights)
        model = cls(GPTConfig(V, T, n_layer, n_head or max(1, C // 64), C))
        model.load_state_dict(weights)
        return model

    @classmethod
    def load(cls, path, vocab_size):
        """A model from a checkpoint of train.py or from GPT-2's pytorch_model.bin.

        Raises ValueError if path is neither or its vocabulary is of another size.
        """
        saved = read(path)
        try:
            if "config" in saved:
                model = cls(GPTConfig(**saved["config"]))
                model.load_state_dict(saved["model"])
            else:
                model = cls.from_gpt2(saved)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"{path}: not the weights of a GPT or of GPT-2") from None
        if model.config.vocab_size != vocab_size:
            raise ValueError(f"{path}: expected a vocabulary of {vocab_size}, the tokenizer's, got "
                             f"{model.config.vocab_size}")
        return model


def read(path):
    """What torch.save wrote to path, on the CPU. Runs no code from it; ValueError if damaged."""
    with open(path, "rb") as file:
        try:
            if file.read(2) == b"PK" and zipfile.ZipFile(file).testzip():  # torch checks no sums
                raise ValueError
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
            return saved if isinstance(saved, dict) else {}
        except Exception:
            raise ValueError(f"{path}: not a checkpoint, or damaged") from None


def save(path, content):
    """torch.save, whole or not at all: after a kill or on a full disk, what was there stays."""
    part = f"{path}.tmp"
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter on top of the system's error
        if os.path.exists(part):
            os.remove(part)
        raise OSError(f"{path} cannot be written: {error.__context__ or error}") from None
