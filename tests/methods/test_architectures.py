"""Every adapter on every supported architecture, through stock transformers classes: start, training, cache,
saving, disabling; and the refusal of models without the modules sought.

Run: python -m pytest tests/methods/test_architectures.py
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel
from tiny import (
    ADAPTERS,
    ARCHITECTURES,
    MIXTURES,
    PAD,
    SIZES,
    VOCAB,
    assert_near,
    attached,
    base,
    batch,
    facts,
    logits,
    prompt_mask,
    train,
    trainable,
)

from moabench import methods
from moabench.methods import catalog
from moabench.methods.spec import ConfigError

PROMPT, BOUND = 5, 5e-5
ALL_LINEARS = {"experts.n": 2, "experts.r": 2, "experts.targets": ["q", "k", "v", "o", "gate", "up", "down"]}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def plain(request):
    """A random model; tests attach to copies of it."""
    return base(request.param)


@pytest.mark.parametrize("name", ADAPTERS)
def test_attach_train_generate_save_disable(name, plain, tmp_path):
    inputs = batch(left=2)
    real = inputs["attention_mask"].bool()
    want = logits(plain, **inputs)
    model = attached(name, copy.deepcopy(plain), trained=False)
    assert_near("logits at step 0", logits(model, **inputs)[real], want[real], 1e-5)
    train(model, steps=2, inputs=inputs)
    full = logits(model, **inputs, **prompt_mask(model, inputs["input_ids"]))
    assert full[real].isfinite().all()
    assert (full - want)[real].abs().max() > 1e-3, "training changed nothing"

    cache = None
    with torch.no_grad():
        for start, stop in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, inputs["input_ids"].shape[1])):
            out = model(
                **(facts(model, inputs) if cache is None else {}),
                input_ids=inputs["input_ids"][:, start:stop],
                position_ids=inputs["position_ids"][:, start:stop],
                attention_mask=inputs["attention_mask"][:, :stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            assert_near(
                f"cached tokens {start}..{stop}",
                out.logits[real[:, start:stop]],
                full[:, start:stop][real[:, start:stop]],
                BOUND,
            )
        tokens = model.generate(
            **facts(model, inputs),
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
        )
    assert tokens.shape == (2, 12)

    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), want)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    for (name_, saved), again in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(saved, again), name_
    # small products may round otherwise where a loaded tensor lies otherwise in memory
    assert_near("logits of the loaded", logits(loaded, **inputs), logits(model, **inputs), 3e-6)


@pytest.mark.parametrize("name", ["molora", "hydralora", "adamole"])
def test_all_seven_roles(name, plain):
    """Fused linears (Phi-3) serve several roles; each role has tensors of its own shape, an effect and a
    gradient."""
    model = attached(name, copy.deepcopy(plain), **ALL_LINEARS)
    config = plain.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv, d, f = (
        heads * config.num_attention_heads,
        heads * config.num_key_value_heads,
        config.hidden_size,
        config.intermediate_size,
    )
    shapes = {
        "q": (d, q),
        "k": (d, kv),
        "v": (d, kv),
        "o": (q, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }
    sites = model.base_model.sites()
    assert len(sites) == 2 * 7
    want = logits(model, **batch())
    for site in sites[:7]:
        bank = site.banks[0]
        assert (bank.A.shape[1], bank.B.shape[0]) == shapes[bank.place], site.name
        with torch.no_grad():
            kept = bank.B.clone()
            bank.B.zero_()
            assert not torch.equal(logits(model, **batch()), want), f"{site.name} has no effect"
            bank.B.copy_(kept)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    without = [n for n, p in trainable(model).items() if p.grad is None or not p.grad.count_nonzero()]
    # AdaMoLE's weights are shares of their sum: 1, without a gradient, where every token of a site selects
    # one expert.
    routing = methods.capture_routing(model, batch()) if name == "adamole" else {}
    alone = {
        site.rpartition(".")[::2] for site, r in routing.items() if (r.chosen[r.mask].sum(-1) == 1).all()
    }
    assert not [
        n
        for n in without
        if not any(f"{layer}.mixture" in n and f"__router__{role}__" in n for layer, role in alone)
    ]
    assert len(alone) < 4


def test_roles_of_a_fused_linear_are_its_slices():
    """Phi-3's qkv_proj with LoRA on v alone changes only the values; the same A and B on separate linears
    give the same model."""
    fused, split = base("phi3"), base("llama", rms_norm_eps=1e-5)
    with torch.no_grad():
        split.load_state_dict(
            {k: v for k, v in fused.state_dict().items() if "qkv" not in k and "gate_up" not in k},
            strict=False,
        )
        for a, b in zip(fused.model.layers, split.model.layers, strict=True):
            b.self_attn.q_proj.weight.copy_(a.self_attn.qkv_proj.weight[:32])
            b.self_attn.k_proj.weight.copy_(a.self_attn.qkv_proj.weight[32:48])
            b.self_attn.v_proj.weight.copy_(a.self_attn.qkv_proj.weight[48:])
            b.mlp.gate_proj.weight.copy_(a.mlp.gate_up_proj.weight[:48])
            b.mlp.up_proj.weight.copy_(a.mlp.gate_up_proj.weight[48:])
        split.model.rotary_emb = fused.model.rotary_emb
    inputs = batch(left=2)
    real = inputs["attention_mask"].bool()
    assert_near("bases", logits(split, **inputs)[real], logits(fused, **inputs)[real], 1e-5)
    for name in MIXTURES:
        pair = [
            attached(
                name,
                copy.deepcopy(m),
                **({} if name != "molora" else {"experts.targets": ["v", "gate", "down"]}),
            )
            for m in (fused, split)
        ]
        assert trainable(pair[0]).keys() == trainable(pair[1]).keys()
        assert_near(name, logits(pair[0], **inputs)[real], logits(pair[1], **inputs)[real], 1e-5)


def test_prompt_term_by_architecture(plain):
    """a += concat_h gamma_h softmax(q_h k_norm(W_k P)_h^T scaling) (W_v P)_h: keys are normalised where the
    model normalises its own (Qwen3 by head, OLMo2 over all heads), have no positions, and keep the model's
    scaling (Gemma2)."""
    only_prompt = {
        "experts.lora": None,
        "experts.parallel_adapter": None,
        "experts.r": None,
        "experts.alpha": None,
        "experts.prompt.length": 3,
    }
    model = attached("naive_sum", copy.deepcopy(plain), **only_prompt)
    layer, ids = model.base_model.model.model.layers[0], batch()["input_ids"]
    attention, bank = layer.self_attn, model.base_model.sites()[0].banks[0].tensors
    seen = {}
    attention.register_forward_pre_hook(
        lambda m, a, k: seen.update(k, hidden=a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    attention.o_proj.register_forward_pre_hook(lambda m, a: seen.update(output=a[0]))
    logits(model, input_ids=ids)
    with_prompt = seen["output"]
    with model.disable_adapter():
        logits(model, input_ids=ids)
    delta = (with_prompt - seen["output"]).unflatten(-1, (4, -1))

    with torch.no_grad():
        size, groups = attention.head_dim, 2

        def project(role, x):
            if hasattr(attention, "qkv_proj"):
                parts = attention.qkv_proj(x).split([4 * size, 2 * size, 2 * size], -1)
                return parts["qkv".index(role)]
            return getattr(attention, f"{role}_proj")(x)

        def norm(role, x):
            module = getattr(attention, f"{role}_norm", None)
            if module is None:
                return x.unflatten(-1, (-1, size))
            by_head = module.weight.numel() == size
            return module(x.unflatten(-1, (-1, size))) if by_head else module(x).unflatten(-1, (-1, size))

        queries = norm("q", project("q", seen["hidden"]))
        half, (cos, sin) = size // 2, seen["position_embeddings"]
        turned = torch.cat([-queries[..., half:], queries[..., :half]], -1)
        queries = queries * cos.unsqueeze(2) + turned * sin.unsqueeze(2)
        keys, values = (
            norm("k", project("k", bank["embedding"])),
            project("v", bank["embedding"]).unflatten(-1, (-1, size)),
        )
        want = torch.zeros_like(delta)
        for h in range(4):
            weights = (queries[:, :, h] @ keys[:, h // groups].t() * attention.scaling).softmax(-1)
            want[:, :, h] = bank["gamma"][h] * (weights @ values[:, h // groups])
    assert_near("prompt term", delta, want, 1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_gpt2_is_refused_with_what_was_sought_and_found(name):
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB))
    with pytest.raises(ConfigError) as error:
        methods.attach(model, catalog.raw(name))
    message = str(error.value)
    for part in ("GPT2LMHeadModel", "q_proj", "self_attn", "c_attn", "c_fc"):
        assert part in message, f"{part} is not in: {message}"


def test_a_layer_without_a_gated_block_is_refused_by_role():
    """OPT has q_proj but no gate: the message names the missing role and what the layer has."""
    model = tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=VOCAB,
            word_embed_proj_dim=16,
        )
    )
    with pytest.raises(ConfigError) as error:
        methods.attach(model, catalog.raw("mixlora"))
    assert "gate" in str(error.value) and "fc1" in str(error.value)


def test_a_refused_model_is_left_as_it_was():
    model = tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=VOCAB,
            word_embed_proj_dim=16,
        )
    )
    names = [n for n, _ in model.named_modules()]
    implementation = model.config._attn_implementation
    for name in ("mixlora", "moa_soft"):
        with pytest.raises(ConfigError):
            methods.attach(model, catalog.raw(name))
    assert [
        n for n, _ in model.named_modules()
    ] == names and model.config._attn_implementation == implementation
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "molora"])
def test_what_was_asked_and_is_not_there_is_an_error_for_all(name):
    """Phi-2 has q, k, v by these names, and neither o nor down."""
    phi = tf.PhiForCausalLM(tf.PhiConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"no place for .*down.* in decoder layer 'model\.layers\.0'"):
        attached(name, phi)
    attached(name, tf.PhiForCausalLM(tf.PhiConfig(**SIZES)), **{"experts.targets": ["q", "k", "v"]})


@pytest.mark.parametrize("name", ["lora", "molora"])
def test_a_model_whose_layers_differ_is_not_adapted_in_part(name):
    model = base(num_hidden_layers=3)
    model.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(ConfigError, match="has 3 decoder layers, of which 2 have an attention with q_proj"):
        attached(name, model)


def test_towers_that_read_no_text_are_left_alone():
    text = tf.MistralConfig(**SIZES, head_dim=8)
    vision = tf.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )

    def model():
        return tf.Mistral3ForConditionalGeneration(tf.Mistral3Config(text_config=text, vision_config=vision))

    adapted = attached("molora", model())
    assert len(adapted.base_model.mixture_layers()) == 2
    assert not [n for n in trainable(adapted) if "vision" in n]
    with pytest.raises(ConfigError, match=r"vision_tower.*tuner=peft would adapt it too"):
        attached("lora", model())
