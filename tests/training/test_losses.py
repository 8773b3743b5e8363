"""Losses and cuts against loops, numbers by hand and finite differences."""

import math

import pytest
import torch

from kv_gym.training.losses import hard_top, listwise_loss, pairwise_hinge, poisson_loss, soft_top, softmax_loss


def test_the_softmax_is_over_all_heads():
    """Gradient of softmax cross-entropy: softmax minus target, over all six slots at once."""
    scores = torch.zeros(1, 2, 3, requires_grad=True)
    softmax_loss(scores, torch.tensor([[[4.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])).backward()
    expected = torch.full((6,), 1 / 6) - torch.tensor([4.0, 0, 0, 1, 1, 0]) / 6
    assert torch.allclose(scores.grad.flatten(), expected, atol=1e-6)


def test_poisson_is_least_at_the_logarithm_of_the_worth():
    utility = torch.tensor([[[0.5, 2.0], [1.0, 0.0]]])
    scores = torch.tensor([[[0.0, 1.0], [-1.0, 0.5]]])
    flat = zip(scores.flatten().tolist(), utility.flatten().tolist(), strict=True)
    by_hand = sum(math.exp(s) - w * s for s, w in flat) / 4 / 0.875
    assert float(poisson_loss(scores, utility, 0.875)) == pytest.approx(by_hand, rel=1e-6)
    best = torch.tensor([0.5, 2.0, 1.0]).log().requires_grad_(True)
    poisson_loss(best.view(1, 1, 3), torch.tensor([[[0.5, 2.0, 1.0]]]), 1.0).backward()
    assert torch.allclose(best.grad, torch.zeros(3), atol=1e-6)


def threshold_by_bisection(scores, count, temperature):
    low, high = -100.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        if sum(1 / (1 + math.exp((middle - s) / temperature)) for s in scores) > count:
            low = middle
        else:
            high = middle
    return low


def test_the_listwise_loss_is_what_soft_cuts_lose():
    torch.manual_seed(0)
    scores, utility = torch.randn(2, 3, 8, dtype=torch.float64), torch.rand(2, 3, 8, dtype=torch.float64) ** 4
    kept = []
    for row, utilities in zip(scores.flatten(1).tolist(), utility.flatten(1).tolist(), strict=True):
        for count in (2, 9):  # shares of 24 slots, rounded down; the smallest share still keeps one slot
            edge = threshold_by_bisection(row, count, 0.3)
            gates = [1 / (1 + math.exp((edge - s) / 0.3)) for s in row]
            best = sum(sorted(utilities)[-count:])
            kept.append(sum(g * w for g, w in zip(gates, utilities, strict=True)) / best)
    shares = torch.tensor([2.9 / 24, 9 / 24 + 1e-6], dtype=torch.float64)
    assert float(listwise_loss(scores, utility, shares, 0.3)) == pytest.approx(1 - sum(kept) / 4, abs=1e-6)
    perfect = 100 * utility.argsort(-1).argsort(-1).double()
    one_head = listwise_loss(perfect[:, :1], utility[:, :1], torch.tensor([1e-3, 0.5], dtype=torch.float64), 0.3)
    assert float(one_head) == pytest.approx(0.0, abs=1e-6)  # far apart, soft cuts are hard


def test_soft_cuts_of_several_rows_are_those_of_each_row():
    torch.manual_seed(0)
    scores, counts = torch.randn(3, 1, 20, dtype=torch.float64), torch.tensor([1.0, 6.5], dtype=torch.float64)
    gates = soft_top(scores, counts, 0.7)
    assert gates.shape == (3, 2, 20)
    for row in range(3):
        for column, count in enumerate(counts.tolist()):
            torch.testing.assert_close(gates[row, column], soft_top(scores[row, 0], count, 0.7))


def test_the_hinge_is_the_mean_over_pairs_that_differ():
    scores, target = torch.tensor([0.3, 0.1, 0.305, 9.0]), torch.tensor([1.0, 2.0, 1.0, 7.0])
    mask = torch.tensor([True, True, True, False])
    pairs = [(1, 0), (1, 2)]  # better, worse
    expected = sum(max(0.0, 0.01 - (scores[b] - scores[w]).item()) for b, w in pairs) / len(pairs)
    assert pairwise_hinge(scores, target, 0.01, mask).item() == pytest.approx(expected)
    assert pairwise_hinge(scores, target, 0.01).item() < expected  # slot 3 leads all others by far
    assert pairwise_hinge(scores[:1], target[:1], 0.01) == 0


def test_soft_gates_sum_to_the_count_and_do_not_care_for_a_shift():
    torch.manual_seed(0)
    scores = torch.randn(50, dtype=torch.float64, requires_grad=True)
    gates = soft_top(scores, 7.0, temperature=0.5)
    assert float(gates.sum()) == pytest.approx(7.0, abs=1e-6)
    weights = torch.rand(50, dtype=torch.float64)
    (slope,) = torch.autograd.grad((gates * weights).sum(), scores)
    assert float(slope.sum()) == pytest.approx(0.0, abs=1e-9)
    for i in (0, 17):
        shift = torch.zeros(50, dtype=torch.float64)
        shift[i] = 1e-5
        up, down = ((soft_top(scores.detach() + s, 7.0, 0.5) * weights).sum() for s in (shift, -shift))
        assert float(slope[i]) == pytest.approx(float(up - down) / 2e-5, rel=1e-3, abs=1e-6)


def test_the_hard_cut_is_hard_and_learns_like_the_soft_one():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1], requires_grad=True)
    gates = hard_top(scores, 2)
    assert gates.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (hard,) = torch.autograd.grad((gates * weights).sum(), scores)
    (soft,) = torch.autograd.grad((soft_top(scores, 2.0) * weights).sum(), scores)
    torch.testing.assert_close(hard, soft)
