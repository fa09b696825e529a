# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""DPO for a model of the transformers library, for people who want a loop they can read and change.

    python -m tests.examples.hugging_face pairs.jsonl export --model openai-community/gpt2

You can also copy this file beside dpo.py and run it there. It trains one epoch on pairs.jsonl, one
JSON object per line: {"prompt": "Q: 2 + 2? A:", "chosen": " 4", "rejected": " It depends."}. Then
it saves the model and its tokenizer to the folder export. For a chat model, write the text of its
template as the prompt (apply_chat_template(messages, tokenize=False, add_generation_prompt=True)),
and add --chat. If that template ends a turn with another token than EOS, set tokenizer.eos_token.

The loop is for decoders. The logits of an encoder–decoder model at position t already predict
token t, so prepend one position to tokens and mask, and append one to the logits:

    sequence_logps(F.pad(logits, (0, 0, 0, 1)), F.pad(tokens, (1, 0)), F.pad(mask, (1, 0)))
"""
import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import dpo_loss, sequence_logps


def encode(tokenizer, prompt, completion, chat):
    """Ids of prompt and completion, apart, so that no token spans both. EOS ends the completion.
    Text such as "</s>" stays text, except in a prompt that a chat template has written."""
    prompt = tokenizer(prompt, add_special_tokens=not chat, split_special_tokens=not chat)
    completion = tokenizer(completion, add_special_tokens=False, split_special_tokens=True)
    return prompt.input_ids, completion.input_ids + [tokenizer.eos_token_id]


def read_pairs(path, tokenizer, context, chat):
    """[(prompt, chosen, rejected)] as ids. Pairs that cannot be used are counted and left out."""
    pairs, empty, too_long, differ = [], 0, 0, 0
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            x, y_w, y_l = record["prompt"], record["chosen"], record["rejected"]
            complete = x.strip() and y_w.strip() and y_l.strip()
            prompt, chosen = encode(tokenizer, x, y_w, chat)
            rejected = encode(tokenizer, x, y_l, chat)[1]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}:{number}: expected strings prompt, chosen and rejected")
        if not complete:
            empty += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > context:
            too_long += 1
        else:
            pairs.append((prompt, chosen, rejected))
            joined = [x + y_w]
            if not (x[-1].isspace() or y_w[0].isspace()):  # the tokenizer may put a space between
                joined.append(x + " " + y_w)
            wholes = [encode(tokenizer, text, "", chat)[0] for text in joined]
            differ += prompt + chosen[:-1] not in wholes
    print(f"{len(pairs)} pairs; left out: {empty} with an empty text, {too_long} longer than the "
          f"model's context of {context} tokens")
    if differ:
        print(f"Warning: in {differ} pairs, prompt and completion encoded apart differ from the "
              "whole text. If prompts end with a space, move it to the completions. If the tokenizer "
              "puts a space before each text, as Llama 2's does, remove it from the completions.")
    return pairs


def collate(pairs, device):
    """tokens (2B, T), and mask (2B, T): True on each completion and its EOS. Chosen rows first."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs]
    rows += [(prompt, rejected) for prompt, _, rejected in pairs]
    tokens = [torch.tensor(x + y) for x, y in rows]
    mask = [torch.tensor([False] * len(x) + [True] * len(y)) for x, y in rows]
    tokens, mask = pad_sequence(tokens, batch_first=True), pad_sequence(mask, batch_first=True)
    for row, scored, (_, y) in zip(tokens, mask, rows, strict=True):
        assert row[scored].tolist() == y, "the mask is not that of the completion and its EOS"
    return tokens.to(device), mask.to(device)


def logps(policy, pairs):
    """Log-probabilities of the chosen completions (B,) and of the rejected completions (B,)."""
    tokens, mask = collate(pairs, policy.device)
    return sequence_logps(policy(tokens).logits, tokens, mask).chunk(2)


def train(policy, pairs, beta, learning_rate, batch_size, seed):
    """One epoch. The reference is the initial policy, so it is scored once, before training."""
    random.Random(seed).shuffle(pairs)  # in a sorted file, neighbours are alike
    batches = [pairs[i:i + batch_size] for i in range(0, len(pairs), batch_size)]
    with torch.no_grad():
        reference = [logps(policy, batch) for batch in batches]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0)
    for i, batch in enumerate(batches):
        chosen, rejected = logps(policy, batch)
        ref_chosen, ref_rejected = reference[i]
        losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref_chosen,
                                                            ref_rejected, beta)
        assert i > 0 or (losses - math.log(2)).abs().max() < 1e-3, (
            "the first losses are not ln 2: policy and reference differ in dropout or dtype")
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        margin = (chosen_rewards - rejected_rewards).mean()
        print(f"step {i + 1}/{len(batches)}: loss {losses.mean():.4f}, margin {margin:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, help="JSONL file of your pairs")
    parser.add_argument("export", type=Path, help="folder for the trained model")
    parser.add_argument("--model", default="openai-community/gpt2", help="name or folder")
    parser.add_argument("--chat", action="store_true", help="a chat template wrote the prompts")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs per step")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs")
    args = parser.parse_args()
    try:
        if not all(0 < x < math.inf for x in (args.beta, args.learning_rate, args.batch_size)):
            raise ValueError("expected --beta, --learning_rate and --batch_size above 0")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        policy = AutoModelForCausalLM.from_pretrained(args.model).float().eval()  # without dropout
        context = getattr(policy.config, "max_position_embeddings", None) or math.inf
        pairs = read_pairs(args.pairs, tokenizer, context, args.chat)
        if not pairs:
            raise ValueError(f"{args.pairs}: no pair to train on")
        args.export.mkdir(parents=True, exist_ok=True)  # before training, so that an error is cheap
    except (OSError, ValueError) as error:
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")  # for LoRA, add the adapter here
    train(policy, pairs, args.beta, args.learning_rate, args.batch_size, args.seed)
    policy.save_pretrained(args.export)
    tokenizer.save_pretrained(args.export)


if __name__ == "__main__":
    main()
