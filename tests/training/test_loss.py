"""Cross-entropy and L2Wrap against hand-computed gradients."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_train.training.loss import language_model_loss, summed_nats


def example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 7, 11, generator=generator, dtype=dtype)).requires_grad_()
    return logits, torch.randint(11, (2, 7), generator=generator)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1024.0])
def test_l2wrap_scales_with_the_incoming_gradient(scale: float) -> None:
    """Gradient = cross-entropy's plus 1e-4/(B·T) · max logit at the largest logit, both times the loss scale."""
    logits, targets = example()
    (gradient,) = torch.autograd.grad(language_model_loss(logits, targets, 1e-4) * scale, logits)
    expected = logits.detach().softmax(-1) - F.one_hot(targets, 11)
    for b in range(2):
        for t in range(7):
            largest = int(logits[b, t].argmax())
            expected[b, t, largest] += 1e-4 * logits[b, t, largest].item()
    torch.testing.assert_close(gradient, expected * scale / 14, rtol=1e-12, atol=1e-15)


def test_the_value_is_the_plain_cross_entropy() -> None:
    logits, targets = example()
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.equal(language_model_loss(logits, targets, 1e-4), plain)


def test_masked_positions_keep_the_l2_term() -> None:
    """B·T is the whole micro-batch, also where targets are masked."""
    logits, targets = example()
    targets[0] = -100
    with_term = torch.autograd.grad(language_model_loss(logits, targets, 1e-4), logits)[0]
    without = torch.autograd.grad(language_model_loss(logits, targets, 0.0), logits)[0]
    where = logits.argmax(-1, keepdim=True)
    expected = torch.zeros_like(logits).scatter(-1, where, logits.detach().gather(-1, where) * 1e-4 / 14)
    torch.testing.assert_close(with_term - without, expected, rtol=1e-9, atol=1e-15)


def test_summed_nats_counts_what_is_predicted() -> None:
    logits, targets = example(torch.float32)
    targets[1, 3:] = -100
    nats, count = summed_nats(logits, targets)
    assert count.item() == 10
    assert (nats / count).item() == pytest.approx(language_model_loss(logits, targets).item(), rel=1e-6)
