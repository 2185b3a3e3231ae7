import torch

from fxquant.algorithms.target import best_shrinkage
from fxquant.observers.moments import LayerMoments

WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


def moments_of(x, shift):
    moments = LayerMoments(x.shape[-1], shift.shape[-1])
    for part in range(0, len(x), 100):
        moments.add(x[part : part + 100], shift[part : part + 100])
    return moments


def float_target(weight, moments):
    shrinkage = best_shrinkage(moments)
    return weight if shrinkage is None else shrinkage.applied(weight, moments, slice(None))


def test_a_shift_that_the_input_explains_is_made_up_for():
    x = torch.randn(4000, 64) * torch.logspace(-1, 1, 64)
    missing = torch.randn(16, 64) * 0.1
    target = float_target(WEIGHT, moments_of(x, x @ missing.T))
    error = (x @ (WEIGHT + missing - target).T).square().mean()
    assert error < 1e-3 * (x @ missing.T).square().mean()


def test_a_shift_of_noise_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator)
    noise = torch.randn(300, 16, generator=generator)
    step = float_target(WEIGHT, moments_of(x, noise)) - WEIGHT
    plain = torch.linalg.lstsq(x, noise).solution.T  # the unshrunken regression
    assert (x @ step.T).square().mean() < 0.1 * (x @ plain.T).square().mean()


def test_a_noisy_shift_is_shrunk_but_helps_on_unseen_tokens():
    generator = torch.Generator().manual_seed(0)
    missing = torch.randn(16, 64, generator=generator) * 0.05
    x, unseen = torch.randn(2, 600, 64, generator=generator)
    shift = x @ missing.T + 0.5 * torch.randn(600, 16, generator=generator)
    step = float_target(WEIGHT, moments_of(x, shift)) - WEIGHT
    plain = torch.linalg.lstsq(x, shift).solution.T
    left = [((missing - s) @ unseen.T).square().mean() for s in (step, plain, torch.zeros(16, 64))]
    assert left[0] < left[1]
    assert left[0] < left[2]


def test_without_a_shift_the_weight_itself_is_the_target():
    for moments in (LayerMoments(64, 16), moments_of(torch.randn(100, 64), torch.zeros(100, 16))):
        assert torch.equal(float_target(WEIGHT, moments), WEIGHT)


def test_one_token_and_inputs_that_are_always_zero_give_a_finite_target():
    for x in (torch.randn(1, 64), torch.zeros(10, 64), torch.ones(50, 1) @ torch.randn(1, 64)):
        target = float_target(WEIGHT, moments_of(x, torch.randn(len(x), 16)))
        assert torch.isfinite(target).all()
