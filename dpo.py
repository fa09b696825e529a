# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290).

You can copy this file into your project, because it needs torch and nothing else. For each pair,
compute four log-probabilities, then the loss:

    policy_chosen_logps = sequence_logps(policy(chosen), chosen, chosen_mask)
    policy_rejected_logps = sequence_logps(policy(rejected), rejected, rejected_mask)
    with torch.no_grad():
        ref_chosen_logps = sequence_logps(reference(chosen), chosen, chosen_mask)
        ref_rejected_logps = sequence_logps(reference(rejected), rejected, rejected_mask)
    losses, chosen_rewards, rejected_rewards = dpo_loss(policy_chosen_logps, policy_rejected_logps,
                                                        ref_chosen_logps, ref_rejected_logps, beta)
    losses.mean().backward()

These models return logits; with a Hugging Face model, pass policy(chosen).logits.

In the paper's notation, x is the prompt, y_w the chosen and y_l the rejected completion. π_θ is the
policy that you train, and π_ref the reference, a frozen copy of the initial policy. Why this loss?
For every reward r, the policy π that maximises E[r] - β KL(π‖π_ref) satisfies
r = β log(π/π_ref) + β log Z(x) (Eq. 5). People prefer y_w to y_l with probability
σ(r(x, y_w) - r(x, y_l)) (Bradley-Terry, Eq. 1), in which log Z(x) cancels. So DPO maximises the
likelihood of the preferences under the implicit reward r̂(x, y) = β log(π_θ(y|x)/π_ref(y|x)).
The KL penalty is already in r̂, so the loss needs no other.
"""
import torch
import torch.nn.functional as F


def sequence_logps(logits, tokens, mask):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) of each row of a batch, from the model's logits.

    logits (B, T, V)  the model's output for tokens. Do not shift it; do not apply softmax.
           (N, V)     or, to save memory, only the logits that predict the N scored tokens:
                      logits[:, :-1][mask[:, 1:]]
    tokens (B, T)     ids of the model's input: prompt, completion, EOS, then padding
    mask   (B, T)     True on the completion and its EOS, False on the prompt and on padding.
                      Build it from lengths, because EOS and padding may have the same id.
    returns (B,)      nats, ≤ 0; float32, or float64 if the logits are float64
    raises ValueError if shapes differ, or if a row's mask is True on its first token or nowhere

    By the chain rule this is a sum; with a mean, β would become β/|y| for |y| tokens.
    Worked value: logits log [[.1 .9] [.3 .7] [.5 .5]], tokens [0 1 0], mask [0 1 1]:
    log .9 + log .3 = -1.309333.
    """
    mask = mask.bool()
    shape = tuple(tokens.shape)
    if len(shape) != 2 or mask.shape != shape:
        raise ValueError(f"expected tokens and mask (B, T), got {shape} and {tuple(mask.shape)}")
    if mask[:, :1].any():
        raise ValueError("expected mask False on each row's first token, which no logits predict: "
                         "set it True only on the completion and its EOS")
    scored = mask[:, 1:]  # (B, T-1): the logits at position t predict token t + 1
    if not scored.any(-1).all():
        raise ValueError("expected a scored token in every row, but the mask of a row has none")
    targets = tokens[:, 1:][scored]  # (N,)
    if logits.shape[:-1] == tokens.shape:
        logits = logits[:, :-1][scored]  # (N, V): the softmax of the others would be wasted
    if logits.dim() != 2 or len(logits) != len(targets):
        raise ValueError(f"expected logits (B, T, V) or (N, V), got {tuple(logits.shape)} for "
                         f"tokens {shape} with {len(targets)} scored")
    # Convert first: in bfloat16, a sum of many log-probabilities can be wrong by several nats.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token_logps = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    return token_logps.new_zeros(scored.shape).masked_scatter(scored, token_logps).sum(-1)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
             *, label_smoothing=0.0):
    """The DPO loss of each pair (Eq. 7) and its two implicit rewards.

        r̂(x, y) = β (log π_θ(y|x) - log π_ref(y|x))                   Eq. 5 without β log Z(x)
        loss = -log σ(r̂(x, y_w) - r̂(x, y_l))                          Eq. 7
        ∇loss = -β σ(r̂_l - r̂_w) (∇log π_θ(y_w|x) - ∇log π_θ(y_l|x))   §4

    four logps (B,)  nats, from sequence_logps. Compute the reference's under torch.no_grad().
    beta             > 0, in reward per nat. A larger β keeps the optimum closer to the reference.
    label_smoothing  ε in [0, 0.5), the fraction of labels that you believe are flipped. It is not
                     in the paper: loss = -(1-ε) log σ(r̂_w - r̂_l) - ε log σ(r̂_l - r̂_w)
    returns          (losses, chosen_rewards, rejected_rewards), each (B,). Train on losses.mean().
                     The rewards include β and have no gradient.
    raises ValueError if shapes differ, the reference has a gradient or an option is out of range

    Worked value: (-3, -2, -2.5, -2.2) at β = 0.3: margin 0.3 ((-3 + 2.5) - (-2 + 2.2)) = -0.21,
    loss -log σ(-0.21) = 0.803650. If policy and reference are equal, the loss is ln 2 = 0.693147.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if len({x.shape for x in logps}) != 1:
        shapes = [tuple(x.shape) for x in logps]
        raise ValueError(f"expected four log-probabilities of one shape, got {shapes}")
    if ref_chosen_logps.requires_grad or ref_rejected_logps.requires_grad:
        raise ValueError("expected reference log-probabilities without gradient, because the "
                         "reference is frozen: compute them under torch.no_grad()")
    if not 0 < beta < float("inf"):
        raise ValueError(f"expected a finite beta > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5), got {label_smoothing}")
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards  # both omit β log Z(x), which cancels
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def preference_metrics(chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """Each standard metric, one value per pair: {name: (B,)}, without gradient. The rewards are
    those of dpo_loss. The names are TRL's, but here a tie counts ½ in the accuracy."""
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards,  # implicit rewards: β times nats
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (margins.sign() + 1) / 2,
        "rewards/margins": margins,
        "logps/chosen": chosen_logps.detach(),  # nats; both may fall while the margin grows
        "logps/rejected": rejected_logps.detach(),
    }


def optimal_logps(ref_logps, rewards, beta):
    """Eq. 4: the policy that maximises the objective of RLHF, E[r] - β KL(π‖π_ref) (Eq. 3).

        log π*(y|x) = log π_ref(y|x) + r(x, y)/β - log Z(x),   Z(x) = Σ_y π_ref(y|x) exp(r(x, y)/β)

    ref_logps, rewards (..., K)  of all K completions of a prompt; beta > 0
    returns (..., K)             nats; log_softmax subtracts log Z(x)

    The expected DPO loss has the same optimum if the pairs cover all completions, labels follow
    Eq. 1, and label_smoothing is 0. Worked value: π_ref (½, ½), r (ln 3, 0), β = 1: π* (¾, ¼).
    """
    return torch.log_softmax(ref_logps + rewards / beta, dim=-1)
