"""On losses whose Hessian is known, products, eigenpairs and alignments are the closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan import linalg
from subspan.inspect import alignments, hessian_gradient_alignment, lanczos, layer_alignment, layer_curvature
from subspan.inspect.curvature import Alignment


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(w):
    net = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.float64))
    net[0].weight.data = w.clone()
    return net


def quadratic(model, h):
    """1/2 vec(w)^T h vec(w), with the Hessian h and the gradient h vec(w)."""
    w = model[0].weight.flatten()
    return 0.5 * w @ h @ w


def symmetric(values, seed=0):
    q = linalg.qr(normal(len(values), len(values), seed=seed))
    return q * torch.tensor(values, dtype=torch.float64) @ q.mT, q


def test_products_and_gradient_of_a_quadratic_are_exact():
    h, _ = symmetric([5, 3, -2, 1, 0.5, 0.1])
    net = layer(normal(2, 3))
    g, product = layer_curvature(net, h, "0", loss=quadratic)
    assert_close(g, h @ net[0].weight.detach().flatten())
    v = normal(6, seed=3)
    assert_close(product(v), h @ v)
    assert net[0].weight.grad is None


@pytest.mark.parametrize("by, want", [("value", [5, 3]), ("magnitude", [-7, 5])])
def test_lanczos_finds_the_top_eigenpairs(by, want):
    h, _ = symmetric([5, 3, -7, 1, 0.5, 0.1])
    top = lanczos(lambda v: h @ v, normal(6), rank=2, steps=6, by=by)
    assert_close(top.values, torch.tensor(want, dtype=torch.float64))
    assert_close(h @ top.vectors, top.vectors * top.values)
    assert_close(top.residuals, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_lanczos_finds_repeated_eigenvalues_and_those_its_start_does_not_have():
    h, q = symmetric([4, 4, 4, 1, 1, 0])
    top = lanczos(lambda v: h @ v, q[:, 3], rank=4, steps=6)
    assert_close(top.values, torch.tensor([4, 4, 4, 1], dtype=torch.float64))
    assert_close(top.vectors.mT @ top.vectors, torch.eye(4, dtype=torch.float64))


def test_residuals_say_how_wrong_eigenpairs_are():
    h, _ = symmetric([1 / (i + 1) for i in range(60)])
    top = lanczos(lambda v: h @ v, normal(60), rank=5, steps=12)
    assert_close(top.residuals, (h @ top.vectors - top.vectors * top.values).norm(dim=0), rtol=1e-6, atol=1e-12)


def test_alignment_of_a_quadratic_is_the_closed_form():
    values = [5.0, 3.0, 2.0, 1.0, 0.5, 0.1]
    h, q = symmetric(values)
    c = normal(6, seed=4)
    net = layer((q @ c).view(2, 3))
    got = layer_alignment(net, h, "0", rank=2, steps=6, loss=quadratic)
    g = torch.tensor(values).double() * c
    assert_close(got.outside, float(g[2:].norm() / g.norm()))
    assert_close(got.inside, float(g[:2].square().sum() / g.square().sum()))
    assert_close(got.values, torch.tensor([5.0, 3.0], dtype=torch.float64))
    assert_close(got.chance, math.sqrt(4 / 6))


def test_a_gradient_of_top_eigenvectors_is_aligned_and_one_of_others_is_not():
    _, q = symmetric([3, 2, 1, 0])
    assert_close(hessian_gradient_alignment(q[:, :2], q[:, :2] @ normal(2)), 0.0, rtol=0, atol=1e-12)
    assert_close(hessian_gradient_alignment(q[:, :2], q[:, 2:] @ normal(2)), 1.0)
    turned = q[:, :2] @ linalg.qr(normal(2, 2))
    g = normal(4, seed=9)
    assert_close(hessian_gradient_alignment(turned, g), hessian_gradient_alignment(q[:, :2], g))


def test_a_layers_hessian_is_the_block_of_the_whole_ones():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    x = normal(5, 3)

    def loss(model, x):
        return model(x).square().sum()

    def of_first(w):
        return (torch.tanh(x @ w.view(4, 3).mT) @ net[2].weight.detach().mT).square().sum()

    block = torch.autograd.functional.hessian(of_first, net[0].weight.detach().flatten())
    v = normal(12, seed=2)
    assert_close(layer_curvature(net, x, "0", loss=loss).product(v), block @ v)
    want = torch.linalg.eigvalsh(block).flip(0)[:3]
    assert_close(alignments(net, x, rank=3, steps=12, loss=loss, select="0")["0"].values, want)


def test_a_transformer_has_second_derivatives_and_is_left_as_it_was():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().train()
    for p in model.parameters():
        p.requires_grad_(False)
    ids = torch.randint(32, (2, 6))
    state = torch.random.get_rng_state()
    batch = {"input_ids": ids, "labels": ids}
    name = "model.layers.0.self_attn.q_proj"
    _, product = layer_curvature(model, batch, name)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    assert not any(p.requires_grad for p in model.parameters())
    # Attention written out has a second derivative of its own; norms and loss are float32 in this model.
    plain = LlamaForCausalLM._from_config(config, attn_implementation="eager").double()
    plain.load_state_dict(model.state_dict())
    weight = f"{name}.weight"

    def loss(w):
        return torch.func.functional_call(plain, {weight: w}, kwargs=batch).loss

    v = normal(64)
    _, want = torch.autograd.functional.vhp(loss, plain.get_parameter(weight).detach(), v.view(8, 8))
    assert_close(product(v), want.flatten(), rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_linear_loss_has_no_curvature():
    net = layer(normal(2, 3))
    _, product = layer_curvature(net, normal(4, 3), "0", loss=lambda model, x: model(x).sum())
    assert_close(product(normal(6)), torch.zeros(6, dtype=torch.float64))


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="rank 5 needs at least as many steps, here 4"):
        lanczos(lambda v: v, normal(9), rank=5, steps=4)
    with pytest.raises(ValueError, match="do not fit a gradient of 3"):
        hessian_gradient_alignment(torch.eye(4), normal(3))
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not depend on 1"):
        layer_curvature(net, torch.ones(1, 2), "1", loss=lambda model, x: model[0](x).sum())
    assert Alignment(1.0, torch.ones(1), torch.zeros(1), 1).chance == 0.0
