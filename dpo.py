# SPDX-License-Identifier: MIT
"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290).

Copy this file into your project: it needs torch and nothing else.

    logps = sequence_logps(model(tokens), tokens, mask)  # four times: see the four names below
    losses, chosen_rewards, rejected_rewards = dpo_loss(policy_chosen_logps, policy_rejected_logps,
                                                        ref_chosen_logps, ref_rejected_logps, beta)
    losses.mean().backward()

In the paper x is the prompt, y_w and y_l the chosen and the rejected completion, π_θ the policy in
training, π_ref the reference, its frozen start, β the strength of the KL penalty, and r̂(x, y) =
β log(π_θ(y|x) / π_ref(y|x)) the implicit reward of a completion. The loss adds no KL term to it.
"""
import torch
import torch.nn.functional as F


def sequence_logps(logits, tokens, mask):
    """Log-probability of each row's scored tokens, log π(y|x) = Σ_t log π(y_t | x, y_<t).

    logits (B, T, V)  the model's for these tokens, raw: not shifted, no softmax
    tokens (B, T)     the ids that went in: prompt, completion, EOS, then padding
    mask   (B, T)     True on exactly the tokens to score, the completion and its EOS; False on
                      prompt and padding. Make it from lengths: EOS and padding may share an id.
    returns (B,)      nats, ≤ 0, float32 (float64 if the logits are)
    raises ValueError if shapes differ, a first token is to be scored, or a row has none to score

    A sum, by the chain rule; with a mean, a completion of |y| tokens would have β/|y| for its β.
    Worked value: logits log [[.1 .9] [.3 .7] [.5 .5]], tokens [0 1 0], mask [0 1 1]:
    log .9 + log .3 = -1.309333.
    """
    if logits.dim() != 3 or logits.shape[:-1] != tokens.shape or mask.shape != tokens.shape:
        raise ValueError(f"expected logits (B, T, V), tokens (B, T) and mask (B, T), got "
                         f"{tuple(logits.shape)}, {tuple(tokens.shape)} and {tuple(mask.shape)}")
    if mask[:, :1].any():
        raise ValueError("expected mask False on each row's first token, which nothing predicts: "
                         "it is True on the completion and its EOS alone, unlike an attention mask")
    # The logits at position t predict the token at t + 1.
    logits = logits[:, :-1]
    tokens = tokens[:, 1:]
    mask = mask[:, 1:].bool()
    if not mask.any(-1).all():
        raise ValueError("expected a token to score in every row, but a row has none")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # sums in bfloat16 err
    logps = torch.log_softmax(logits, dim=-1)  # (B, T-1, V)
    logps = logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, T-1)
    return torch.where(mask, logps, 0.0).sum(-1)  # select, never multiply: -inf * 0 is nan


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
             *, label_smoothing=0.0):
    """The DPO loss of each pair (Eq. 7), and the implicit rewards that it compares.

        r̂(x, y) = β (log π_θ(y|x) - log π_ref(y|x))                   Eq. 5 without β log Z(x)
        loss = -log σ(r̂(x, y_w) - r̂(x, y_l))                          Eq. 7
        ∇loss = -β σ(r̂_l - r̂_w) (∇log π_θ(y_w|x) - ∇log π_θ(y_l|x))   §4: wrong pairs weigh most

    four log-probabilities (B,)  nats, from sequence_logps, the reference's under torch.no_grad()
    beta             > 0, in reward per nat. Larger keeps the optimum nearer to the reference.
    label_smoothing  ε in [0, 0.5): the fraction of labels believed flipped, not in the paper. Then
                     loss = -(1-ε) log σ(r̂_w - r̂_l) - ε log σ(r̂_l - r̂_w)  ("conservative DPO")
    returns (losses, chosen_rewards, rejected_rewards), each (B,), one entry a pair; train on
                     losses.mean(). The rewards carry β and no gradient.
    raises ValueError if shapes differ, the reference has a gradient or an option is out of range

    Worked value: (-3, -2, -2.5, -2.2) at β = 0.3: margin 0.3 ((-3 + 2.5) - (-2 + 2.2)) = -0.21,
    loss -log σ(-0.21) = 0.803650. Where policy and reference agree the loss is ln 2 = 0.693147.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if len({x.shape for x in logps}) != 1:
        raise ValueError(f"expected four log-probabilities of one shape, got "
                         f"{', '.join(str(tuple(x.shape)) for x in logps)}")
    if ref_chosen_logps.requires_grad or ref_rejected_logps.requires_grad:
        raise ValueError("expected reference log-probabilities without gradient, which must not be "
                         "trained: compute them under torch.no_grad()")
    if not 0 < beta < float("inf"):
        raise ValueError(f"expected a finite beta > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5), got {label_smoothing}")
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards  # β log Z(x), left out of both, would cancel here
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def preference_metrics(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """What the field logs, by its names. Five (B,) in, a dict of (B,) out: log the means."""
    margins = chosen_rewards - rejected_rewards
    return {
        "loss": losses,  # nats; train on its mean, the rest is detached
        "rewards/chosen": chosen_rewards,  # implicit rewards, β times nats
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (margins.sign() + 1) / 2,  # ½ at 0: before training it is 0.5, not 0
        "rewards/margins": margins,
        "logps/chosen": chosen_logps.detach(),  # nats; both may fall while the margin grows
        "logps/rejected": rejected_logps.detach(),
    }


def optimal_logps(ref_logps, rewards, beta):
    """The policy that maximises E[r] - β KL(π‖π_ref), the aim of RLHF (Eq. 3), which is (Eq. 4)

        log π*(y|x) = log π_ref(y|x) + r(x, y)/β - log Z(x)

    ref_logps, rewards (..., K)  over all K completions of a prompt; beta > 0
    returns (..., K)             nats; log_softmax subtracts log Z(x), Z = Σ_y π_ref(y|x) exp(r/β)

    The expected DPO loss has the same optimum, if pairs cover all completions, labels are
    Bradley-Terry with rewards r (Eq. 1), and nothing is smoothed.
    Worked value: π_ref (½, ½), rewards (ln 3, 0), β = 1: π* = (¾, ¼).
    """
    return torch.log_softmax(ref_logps + rewards / beta, dim=-1)
