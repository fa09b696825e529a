"""dpo.py against examples by hand and independent formulas."""
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import dpo
from dpo import dpo_loss, optimal_logps, preference_metrics, sequence_logps

# Fixture F1. The stub model's logits are the log of the row that its input token names. Prompt
# [0, 1], chosen [2, 3, 0], rejected [1, 0]; token 0 is EOS and padding. The reference is uniform.
P = torch.tensor([[.1, .2, .3, .4], [.4, .3, .2, .1], [.25, .25, .25, .25], [.7, .1, .1, .1]], dtype=torch.float64)
TOKENS = torch.tensor([[0, 1, 2, 3, 0, 0], [0, 1, 1, 0, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()
LOGITS = P.log()[TOKENS]
REF = torch.tensor([3, 2], dtype=torch.float64) * math.log(1 / 4)


def test_f1_log_probabilities_loss_and_rewards():
    chosen, rejected = sequence_logps(LOGITS, TOKENS, MASK)
    assert [chosen, rejected] == pytest.approx([-3.352407, -2.120264], abs=1e-6)
    assert list(dpo_loss(chosen, rejected, *REF, 0.1)) == pytest.approx([.685469, .080648, .065233], abs=1e-6)
    assert dpo_loss(chosen, rejected, *REF, 0.1, label_smoothing=0.1)[0].item() == pytest.approx(.687011, abs=1e-6)


@pytest.mark.parametrize("mask, shift, value", [
    ([0, 1, 1, 1, 0, 0], 0, -4.605170), ([0, 0, 0, 1, 1, 0], 0, -1.742969), ([0, 0, 1, 1, 0, 0], 0, -2.995732),
    ([0, 0, 1, 1, 1, 1], 0, -5.654992), ([0, 1, 1, 1, 1, 0], 0, -4.961845), ([0, 0, 0, 1, 1, 1], 1, -5.991465)],
    ids=["mask shifted left", "first completion token dropped", "EOS not scored", "padding scored",
         "prompt scored", "logits of a token's own position"])
def test_f1_value_of_each_wrong_mask(mask, shift, value):
    """A wrong mask or shift gives its own value, computed by hand. The right value is -3.352407."""
    logps = sequence_logps(LOGITS[:1], TOKENS[:1].roll(shift), torch.tensor([mask]))
    assert logps.item() == pytest.approx(value, abs=1e-6)


def test_worked_values_of_the_docstrings():
    logits = torch.tensor([[[.1, .9], [.3, .7], [.5, .5]]]).log()
    logp = sequence_logps(logits, torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 1]]))
    assert logp.item() == pytest.approx(-1.309333, abs=1e-6)
    four = [torch.tensor([x]) for x in (-3.0, -2.0, -2.5, -2.2)]
    assert dpo_loss(*four, 0.3)[0].item() == pytest.approx(0.803650, abs=1e-6)
    best = optimal_logps(torch.tensor([.5, .5]).log(), torch.tensor([math.log(3), 0]), 1.0).exp()
    assert best.tolist() == pytest.approx([.75, .25])


def test_loss_goldens():
    """β = 0.1, differences of log-ratios h = 0, 10, 20, compared with an independent NumPy formula."""
    def losses(h, **options):
        h = torch.tensor(h, dtype=torch.float64)
        return dpo_loss(h - 7, torch.full_like(h, -5), torch.full_like(h, -6), torch.full_like(h, -4), 0.1, **options)[0].numpy()
    assert losses([0, 10, 20]) == pytest.approx(np.log1p(np.exp(-0.1 * np.array([0, 10, 20]))), abs=1e-12)
    assert losses([0, 10, 20]) == pytest.approx([.69314718, .31326169, .12692801], abs=1e-8)
    assert losses([0, -10, -20]) == pytest.approx([.69314718, 1.31326169, 2.12692801], abs=1e-8)
    assert losses([0, 10, 20], label_smoothing=0.1) == pytest.approx([.69314718, .41326169, .32692801], abs=1e-8)


def test_gradient_golden():
    """∂loss/∂(policy chosen, policy rejected, ref chosen, ref rejected) = (-, +, +, -) 0.165692."""
    four = torch.tensor([-3, -2, -2.5, -2.2], dtype=torch.float64)
    policy = four[:2].clone().requires_grad_()
    dpo_loss(*policy, *four[2:], 0.3)[0].backward()
    assert policy.grad.tolist() == pytest.approx([-.165692, .165692], abs=1e-6)
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    slopes = [(dpo_loss(*(four + d), 0.3)[0] - dpo_loss(*(four - d), 0.3)[0]).item() / 2e-6 for d in step]
    assert slopes == pytest.approx([-.165692, .165692, .165692, -.165692], abs=1e-6)


def test_rewards_carry_beta_and_they_and_the_metrics_have_no_gradient():
    policy = [torch.tensor([x], requires_grad=True) for x in (-3.0, -2.0)]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*policy, torch.tensor([-2.5]), torch.tensor([-2.2]), 0.3)
    assert chosen_rewards.item() == pytest.approx(-0.15) and rejected_rewards.item() == pytest.approx(0.06)
    metrics = preference_metrics(chosen_rewards, rejected_rewards, *policy)
    assert losses.requires_grad and not any(x.requires_grad for x in (chosen_rewards, rejected_rewards, *metrics.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_have_a_finite_loss_and_gradient(dtype):
    """log(sigmoid(-1000)) would be -inf; the loss is 1000, and its gradient has size β."""
    policy = torch.tensor([-1000.0], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    loss = dpo_loss(policy, zero, zero, zero, 1.0)[0]
    loss.sum().backward()
    assert loss.item() == 1000 and policy.grad.item() == -1
    far = torch.tensor([-1e6], dtype=dtype)
    assert dpo_loss(far, zero, zero, zero, 1.0, label_smoothing=0.1)[0].isfinite().all()


@pytest.mark.parametrize("change, message", [
    ({"beta": 0.0}, "expected a finite beta > 0, got 0.0"), ({"beta": -1.0}, "expected a finite beta > 0, got -1.0"),
    ({"beta": math.nan}, "expected a finite beta > 0, got nan"), ({"beta": math.inf}, "got inf"),
    ({"label_smoothing": 0.5}, "got 0.5"), ({"label_smoothing": -0.1}, "got -0.1"), ({"label_smoothing": math.nan}, "got nan"),
    ({"policy_chosen_logps": torch.zeros(3, 1)}, r"got \[\(3, 1\), \(3,\), \(3,\), \(3,\)\]"),
    ({"policy_rejected_logps": torch.zeros(1)}, r"got \[\(3,\), \(1,\), \(3,\), \(3,\)\]"),
    ({"ref_chosen_logps": torch.zeros(3, 1)}, r"got \[\(3,\), \(3,\), \(3, 1\), \(3,\)\]"),
    ({"ref_rejected_logps": torch.zeros(2)}, r"got \[\(3,\), \(3,\), \(3,\), \(2,\)\]")])
def test_dpo_loss_refuses_bad_arguments(change, message):
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    arguments = {name: torch.zeros(3) for name in names} | {"beta": 0.1} | change
    with pytest.raises(ValueError, match=message):
        dpo_loss(**arguments)


ONE_EMPTY = MASK & torch.tensor([[True], [False]])


@pytest.mark.parametrize("logits, tokens, mask, message", [
    (LOGITS[:, :5], TOKENS, MASK, r"got \(2, 5, 4\) for tokens \(2, 6\) with 5 scored"),
    (LOGITS[0, :4], TOKENS, MASK, r"got \(4, 4\) for tokens \(2, 6\) with 5 scored"),
    (LOGITS, TOKENS, MASK[:, :5], r"expected tokens and mask \(B, T\), got \(2, 6\) and \(2, 5\)"),
    (LOGITS[None], TOKENS[None], MASK[None], r"expected tokens and mask \(B, T\), got \(1, 2, 6\)"),
    (LOGITS, TOKENS, ONE_EMPTY, "the mask of a row has none"),
    (LOGITS[:, :-1][ONE_EMPTY[:, 1:]], TOKENS, ONE_EMPTY, "the mask of a row has none"),
    (LOGITS[:, :0], TOKENS[:, :0], MASK[:, :0], "the mask of a row has none")])
def test_sequence_logps_refuses_bad_arguments(logits, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        sequence_logps(logits, tokens, mask)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("mask", [torch.ones(2, 6), ~MASK, TOKENS >= 0], ids=["attention mask", "inverted", "not padding"])
def test_a_mask_that_scores_the_first_token_is_refused(mask, row):
    """It is refused in any row, not only in the first one."""
    one_wrong_row = MASK.clone()
    one_wrong_row[row] = mask[row].bool()
    with pytest.raises(ValueError, match="expected mask False on each row's first token.*the completion and its EOS"):
        sequence_logps(LOGITS, TOKENS, one_wrong_row)


def test_selected_logits_give_the_same_values_and_gradients_as_all_logits():
    """(N, V) and (B, T, V), in float64 to 1e-12. The rows have different numbers of scored tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(11, (3, 7), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1, 1]]).bool()
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    everything = sequence_logps(logits, tokens, mask)
    selected = sequence_logps(logits[:, :-1][mask[:, 1:]], tokens, mask)
    assert torch.allclose(everything, selected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((weights * x).sum(), logits)[0] for x in (everything, selected)]
    assert torch.allclose(*gradients, atol=1e-12, rtol=0) and gradients[0].abs().max() > 0.1


def test_a_reference_with_a_gradient_is_refused():
    """This also catches, in training, a swapped policy and reference, and the order (pc, rc, pr, rr)."""
    policy, ref = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    assert dpo_loss(*policy, *ref, 0.1)[0].requires_grad
    for four in ([*policy, *policy], [*ref, *policy], [policy[0], ref[0], policy[1], ref[1]], [*policy, ref[0], policy[1]]):
        with pytest.raises(ValueError, match="reference log-probabilities without gradient.*torch.no_grad"):
            dpo_loss(*four, 0.1)


def test_minus_infinity_outside_the_mask_does_no_harm():
    """-inf × 0 is nan, so the scored log-probabilities are selected. The prompt's -inf has no effect."""
    logits = LOGITS.clone()
    logits[:, 0, 1] = -math.inf  # the prompt's second token is impossible
    logits.requires_grad_()
    logps = sequence_logps(logits, TOKENS, MASK)
    logps.sum().backward()
    assert logps.tolist() == pytest.approx([-3.352407, -2.120264], abs=1e-6)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_logits_are_widened_before_softmax_and_sum(dtype, scale):
    """200 tokens summed in bfloat16 would err by nats: the result equals that of the same logits
    in float64 to float32 rounding. Logits of ±1e4 stay finite, and so do their gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(2, 201, 50, generator=generator)).to(dtype).requires_grad_()
    tokens = torch.randint(50, (2, 201), generator=generator)
    mask = torch.arange(201).expand(2, 201) > 0
    logps = sequence_logps(logits, tokens, mask)
    exact = sequence_logps(logits.double(), tokens, mask)
    logps.sum().backward()
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logps.double().tolist() == pytest.approx(exact.tolist(), rel=1e-6)
    assert logps.isfinite().all() and logits.grad.isfinite().all()


def test_metrics_have_trls_names_and_a_tie_counts_half():
    metrics = preference_metrics(torch.tensor([1., 0., 0., 2.]), torch.tensor([0., 1., 0., 0.]),
                                 torch.tensor([-1., -2., -3., -4.]), torch.tensor([-5., -6., -7., -8.]))
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "rewards/chosen": [1, 0, 0, 2], "rewards/rejected": [0, 1, 0, 0],
        "rewards/margins": [1, -1, 0, 2], "rewards/accuracies": [1, 0, 0.5, 1],
        "logps/chosen": [-1, -2, -3, -4], "logps/rejected": [-5, -6, -7, -8]}


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_logps_are_minus_the_loss_of_the_transformers_library_times_its_tokens(name):
    """Row by row, with labels -100 outside the mask, for random weights in float64."""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    torch.manual_seed(0)
    if name == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=4, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2))
    model = model.double().eval()
    logps = sequence_logps(model(TOKENS).logits, TOKENS, MASK)
    for i in range(2):
        labels = torch.where(MASK[i:i + 1], TOKENS[i:i + 1], -100)
        loss = model(TOKENS[i:i + 1], labels=labels).loss
        assert logps[i].item() == pytest.approx(-loss.item() * MASK[i].sum().item(), abs=1e-6)


def test_dpo_py_works_alone_in_another_folder(tmp_path):
    """It imports torch and nothing else."""
    imports = re.findall(r"^ *(?:import|from) +(\w+)", pathlib.Path(dpo.__file__).read_text(encoding="utf-8"), re.M)
    assert set(imports) == {"torch"}
    shutil.copy(dpo.__file__, tmp_path)
    code = "import torch, dpo; z = torch.zeros(2); print(dpo.dpo_loss(z, z, z, z, 0.1)[0].mean().item())"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert float(out.stdout) == pytest.approx(math.log(2)), out.stderr
