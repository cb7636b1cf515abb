"""Measures of gradients and scores in closed form.

pytest tests/analysis/test_optimisation.py
"""

import math

import pytest
import torch

from moabench.analysis.measures import optimisation as opt

GRADIENTS = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [0, 0, 0], [0, 3, 4]])


def test_conflict_of_task_gradients():
    cosine = opt.gradient_cosine(GRADIENTS)
    assert cosine[0, 1].item() == pytest.approx(-math.sqrt(0.5))
    assert cosine[1, 3].item() == pytest.approx(3 / (5 * math.sqrt(2)))
    assert cosine[2].isnan().all()
    assert opt.conflict_share(GRADIENTS).item() == pytest.approx(1 / 3)
    assert opt.mean_cosine(GRADIENTS).item() == pytest.approx(
        (-math.sqrt(0.5) + 0 + 3 / (5 * math.sqrt(2))) / 3
    )
    assert opt.conflict_share(GRADIENTS[2:]).isnan()


def test_similarity_of_lengths():
    found = opt.magnitude_similarity(GRADIENTS)
    assert found[0, 3].item() == pytest.approx(2 * 5 / 26)
    assert found[0, 0].item() == 1 and found[0, 2].item() == 0


def test_gradients_of_experts():
    gradient, owner = torch.tensor([[3.0, 0], [0, 4], [0, 0], [1, 0]]), torch.tensor([0, 0, 1, 2])
    assert opt.expert_gradients(gradient, owner).tolist() == [5, 0, 1]
    assert opt.zero_gradient_share(torch.tensor([[0.0, 1, 0], [1, 1, 0]])).tolist() == [0.5, 0, 1]


def test_scale_of_scores():
    uniform = torch.zeros(5, 8)
    torch.testing.assert_close(opt.logsumexp(uniform), torch.full((5,), math.log(8)))
    assert opt.z_loss(uniform).item() == pytest.approx(math.log(8) ** 2)
    scores = torch.randn(2, 5, 8)
    torch.testing.assert_close(opt.z_loss(scores), (scores.exp().sum(-1).log() ** 2).mean(-1))
