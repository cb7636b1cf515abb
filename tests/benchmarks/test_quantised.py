"""A base in 4 or 8 bits (bitsandbytes, here on the CPU): every method works on it as on the weights that it
stands for.

Run: python -m pytest tests/benchmarks/test_quantised.py
"""

import pytest
import torch
from test_cli import moabench
from torch import nn

from moabench import methods
from moabench.benchmarks.bases.adapters import load_adapter
from moabench.benchmarks.bases.loading import load_model
from moabench.benchmarks.config.sections import ModelConfig
from moabench.benchmarks.machine.files import read_json
from moabench.benchmarks.run.folder import find
from moabench.benchmarks.training.memory import NF4_BYTES
from moabench.methods import catalog
from moabench.methods.spec import ConfigError

bnb = pytest.importorskip("bitsandbytes")


def base(bits: int | None) -> nn.Module:
    return load_model(ModelConfig("tiny", kind="builtin", quantize=bits), 0, "cpu")[0]


@pytest.fixture(scope="module")
def unpacked():
    """The shipped base with the weights that its 4-bit form stands for."""
    packed, plain = base(4), base(None)
    for name, module in packed.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain.state_dict()


def results(net: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Logits and all gradients of a method whose trainable tensors are moved off their start."""
    torch.manual_seed(0)
    net = methods.attach(net, catalog.raw(name)).eval()
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key in sorted(trained):
            trained[key].add_(torch.randn(trained[key].shape, generator=generator), alpha=0.02)
    ids = torch.randint(2000, (2, 12), generator=generator)
    logits = net(input_ids=ids).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {key: p.grad for key, p in trained.items() if p.grad is not None}


@pytest.fixture
def repacking(monkeypatch):
    """bitsandbytes as on a CPU with avx512_bf16: it repacks a 4-bit linear in the first evaluation pass of a
    layer whose input needs no gradient, and runs it from then on by a kernel without one. Here that kernel
    meets weights that it cannot read."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


METHODS = ["lora", "molora", "moe_lora_topk", "hydralora", "adamole", "mixlora", "moa_soft", "moa_sparse"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_packed_base_is_that_on_its_weights(name, unpacked, repacking):
    plain = base(None)
    plain.load_state_dict(unpacked)
    want, got = results(plain, name), results(base(4), name)
    assert want.keys() == got.keys() and len(want) > 1
    for key, tensor in want.items():
        torch.testing.assert_close(
            got[key],
            tensor,
            rtol=1e-3,
            atol=1e-4 * float(tensor.abs().max() + 1e-12),
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_a_packed_base_stays_what_it_is(repacking, tmp_path):
    """Evaluated, checkpointed, evaluated, saved with its adapter and loaded again: the same logits, bit for
    bit, and a gradient each time."""
    net, ids = base(4), torch.randint(2000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frozen = net(input_ids=ids).logits
    net.state_dict()
    net = methods.attach(net, catalog.raw("molora"))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.requires_grad and name.endswith("__B"):
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        with net.disable_adapter():
            assert torch.equal(net(input_ids=ids).logits, frozen)
        trained = net(input_ids=ids).logits
        net.state_dict()
        assert torch.equal(net(input_ids=ids).logits, trained) and not torch.equal(trained, frozen)
    net(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    net.save_pretrained(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(load_adapter(base(4), tmp_path)(input_ids=ids).logits, trained)


def test_a_repacked_base_is_refused(repacking):
    """One that the user's own code has evaluated before attaching."""
    net = base(4)
    for module in net.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as without load_model
    linear = net.model.layers[1].self_attn.q_proj
    linear.weight.data, linear.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    for method in ("molora", "lora"):
        with pytest.raises(
            ConfigError, match=r"layers\.1\.self_attn\.q_proj: bitsandbytes has repacked.*Load it again"
        ):
            methods.attach(net, catalog.raw(method))


def test_a_weight_takes_what_the_estimate_says():
    weight = base(4).model.layers[0].mlp.up_proj.weight
    state = weight.quant_state
    scales = (state.absmax, state.state2.absmax)
    held = sum(t.numel() * t.element_size() for t in (weight.data, *scales))
    assert held == pytest.approx(NF4_BYTES * state.shape.numel(), rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_on_a_packed_base(bits, tmp_path):
    """From the command line: trained, evaluated, and its adapter loads on such a base again."""
    args = [
        "method=moa_soft",
        f"model.quantize={bits}",
        "task=arc_easy",
        "train=smoke",
        "data.eval_limit=8",
        "data.train_limit=32",
    ]
    done = moabench(
        *args,
        "forgetting=none",
        "logger=none",
        "probe.times=1",
        "device=cpu",
        "threads=1",
        "quiet=true",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = find(tmp_path / "runs")
    metrics = read_json(folder / "metrics.json")
    assert (
        metrics["train/loss_task"] > 0
        and "bitsandbytes" in read_json(folder / "environment.json")["packages"]
    )
    ids = torch.randint(2000, (1, 8), generator=torch.Generator().manual_seed(0))
    assert load_adapter(base(bits), folder / "adapter")(input_ids=ids).logits.isfinite().all()
