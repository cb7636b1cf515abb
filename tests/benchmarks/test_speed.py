"""The rivals of benchmarks/speed.py compute the same thing: outputs and all gradients, at a size that takes no time."""

import pytest
import torch

from moabench.benchmarks import speed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", ["molora", "moe_lora_topk", "adamole", "hydralora", "mixlora (whole FFN)"])
def test_rivals_agree(name):
    torch.manual_seed(0)
    t, rivals = speed.mixtures(16, torch.float32, n=5, r=3)[name]
    x = torch.randn(13, 16, requires_grad=True)
    ours = speed.gradients(rivals["ours"], x, t)
    for rival, f in rivals.items():
        assert speed.disagreement(ours, speed.gradients(f, x, t)) < 1e-5, rival


def test_the_floor_is_the_flop_count_by_hand():
    frozen = torch.nn.Linear(4, 8, bias=False).requires_grad_(False)
    model = torch.nn.Sequential(frozen)
    model.register_parameter("a", torch.nn.Parameter(torch.zeros(2, 4)))
    config = type("Config", (), {"hidden_size": 4, "num_hidden_layers": 1})
    assert speed.floor(model, config, length=10) == pytest.approx(1 + 6 * 8 / (4 * 32 + 7 * 10 * 4))


def test_an_unknown_table_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["speed", "modle"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "modle" in capsys.readouterr().err
