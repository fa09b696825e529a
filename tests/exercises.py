# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of Minimal DPO
"""The exercises of tutorial.ipynb: a hint for each, and a computation that tests an answer.

The solutions are at the end of the notebook. tests/test_tutorial.py runs them through check.
"""
import math

import torch
import torch.nn.functional as F

# Three pairs: log-probabilities (policy chosen, policy rejected, ref chosen, ref rejected), nats.
LOGPS = torch.tensor([[-3.0, -5.0, -1.0], [-2.0, -9.0, -1.0],
                      [-2.5, -5.0, -2.0], [-2.2, -4.0, -1.5]])
BETA = 0.3
# Two rows for a mask. Token 0 is both EOS and padding. Lengths: (prompt, answer with its EOS).
TOKENS = torch.tensor([[7, 8, 3, 0, 0, 0], [5, 7, 8, 4, 2, 0]])
LENGTHS = [(2, 2), (3, 3)]
MASK = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def near(answer, value):
    return abs(answer - value) < 0.005


def smallest(loss):
    """The margin at which a loss is smallest, searched on a grid."""
    grid = torch.linspace(-10, 10, 20001).double()
    return grid[loss(grid).argmin()].item()


def is_loss(function):
    """Compare with log(1 + e^-margin) on three pairs, and ask for a margin of -1,000."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = LOGPS
    margins = BETA * (policy_chosen - policy_rejected - (ref_chosen - ref_rejected))
    far = function(*torch.tensor([[-1000.0], [0.0], [0.0], [0.0]]), 1.0)
    right = torch.allclose(function(*LOGPS, BETA), torch.log1p(torch.exp(-margins)), atol=1e-5)
    return right and bool(torch.isclose(far, torch.tensor(1000.0)).all())


def is_slope(function):
    """Compare with autograd's derivative for the policy's rejected log-probability."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = LOGPS
    rejected = policy_rejected.clone().requires_grad_(True)
    margins = BETA * ((policy_chosen - ref_chosen) - (rejected - ref_rejected))
    (-F.logsigmoid(margins)).sum().backward()
    return torch.allclose(function(*LOGPS, BETA), rejected.grad, atol=1e-5)


EXERCISES = {  # number: (test of an answer, hint)
    0: (lambda x: near(x, math.log(1 + math.exp(-0.5 * (0 - -2)))),
        "the margin is 0.5 times the difference of the log-ratios 0 and -2"),
    1: (lambda x: near(x, sigmoid(1 - 3)), "use Eq. 1 with the rewards in the order 1, 3"),
    2: (lambda x: near(x, 0.5 * 3**2 / (0.5 * 3**2 + 0.5)),
        "the products are ½ e^(r/β); what is e^(ln 3 / ½)?"),
    3: (is_loss, "the margin is chosen minus rejected, and policy minus reference; F.logsigmoid is "
                 "finite where log(sigmoid(...)) is not"),
    4: (lambda f: f(TOKENS, LENGTHS).equal(MASK),
        "compare torch.arange(T) with two bounds in each row"),
    5: (is_slope, "the margin contains -β log π(y_l|x); multiply -β by the slope of the loss"),
    6: (lambda x: near(x, sigmoid(1)), "the best policy predicts the better answer every time"),
    7: (lambda x: near(x, (1 - 3) / 2), "use (r - β log Z)/β"),
    8: (lambda x: near(x, sigmoid(0.1 * (1.5 - -0.5))), "the margin is β times 1.5 - (-0.5)"),
    9: (lambda x: near(x, smallest(lambda m: -0.9 * F.logsigmoid(m) - 0.1 * F.logsigmoid(-m))),
        "set the derivative to zero: it vanishes where σ(margin) = 1 - ε")}


def verdict(number, answer):
    """One line about an answer: a number, a function, or None if there is no answer yet."""
    is_right, hint = EXERCISES[number]
    if answer is None:
        return f"exercise {number}: replace None by your answer. Hint: {hint}"
    try:
        right = is_right(answer)
    except Exception as error:  # the answer is any code of the reader
        return f"exercise {number}: not right, it raised {error!r}. Hint: {hint}"
    return f"exercise {number}: " + ("right" if right else f"not right. Hint: {hint}")


def check(number, answer):
    print(verdict(number, answer))
