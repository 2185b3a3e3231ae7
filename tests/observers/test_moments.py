import torch

from fxquant.observers.moments import LayerMoments, damped


def test_sums_over_both_halves_are_the_sums_over_all_tokens():
    x, shift = torch.randn(7, 5, 16), torch.randn(7, 5, 4)
    moments = LayerMoments(16, 4)
    for part in range(0, 7, 2):
        moments.add(x[part : part + 2], shift[part : part + 2])
    x, shift = x.flatten(0, 1), shift.flatten(0, 1)
    assert moments.tokens == 35
    assert torch.allclose(moments.hessian, x.T @ x, atol=1e-4)
    assert torch.allclose(moments.cross.sum(0), shift.T @ x, atol=1e-4)
    assert torch.allclose(moments.importance, x.square().mean(0), atol=1e-5)
    assert torch.allclose(moments.total, x.double().sum(0), atol=1e-5)
    assert torch.allclose(moments.total_shift, shift.double().sum(0), atol=1e-5)
    assert moments.hessians.diagonal(dim1=1, dim2=2).amin() > 0  # tokens went to either half


def test_padding_does_not_count():
    x, shift = torch.randn(2, 6, 16), torch.randn(2, 6, 3)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    spoiled = x.clone()
    spoiled[~mask] = 1e6
    one, two = LayerMoments(16, 3), LayerMoments(16, 3)
    one.add(spoiled, shift, mask)
    two.add(x[mask], shift[mask])
    assert one.tokens == two.tokens == 10
    assert torch.allclose(one.hessian, two.hessian)
    assert torch.allclose(one.cross, two.cross)


def test_one_token_is_enough():
    moments = LayerMoments(4, 2)
    moments.add(torch.ones(1, 4), torch.ones(1, 2))
    assert moments.tokens == 1
    assert torch.equal(moments.hessian, torch.ones(4, 4))


def test_damping_gives_dead_inputs_a_place_of_their_own():
    hessian = torch.diag(torch.tensor([4.0, 0.0]))
    assert torch.equal(damped(hessian, 0.5), torch.diag(torch.tensor([5.0, 3.0])))
    assert torch.isfinite(damped(torch.zeros(2, 2), 0.5)).all()
