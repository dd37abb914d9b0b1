"""Cross-entropy and L2Wrap against hand-computed gradients."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import rwkv_train.training.loss as loss_module
from rwkv_train.training.loss import head_loss, head_nats, language_model_loss, summed_nats


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
    """B·T is the complete micro-batch, also where targets are masked."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 50, 10_000])
def test_the_chunked_loss_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int) -> None:
    """Value and both gradients, with masked targets, L2Wrap and an incoming gradient, whatever the chunk."""
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 17, 8, generator=generator).requires_grad_()
    weight = torch.randn(11, 8, generator=generator).requires_grad_()
    targets = torch.randint(11, (2, 17), generator=generator)
    targets[0, 3:6] = -100
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = language_model_loss(F.linear(hidden, weight), targets, 1e-2)
        chunked = head_loss(hidden, weight, targets, 1e-2)
        nats, _ = summed_nats(F.linear(hidden, weight), targets)
        torch.testing.assert_close(head_nats(hidden, weight, targets), nats)
    for name, loss in (("plain", plain), ("chunked", chunked)):
        found[name] = (loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight)))
    for one, other in zip(found["chunked"], found["plain"], strict=True):
        rounding = torch.finfo(dtype).eps * other.abs().max()
        torch.testing.assert_close(one, other, rtol=0, atol=4 * float(rounding))


def peak_of(loss: str, vocab_size: int, length: int) -> int:
    """Bytes above the inputs and the gradients that a forward and a backward pass need, in a process of its own."""
    code = f"""
import torch, pathlib
from rwkv_train.training.loss import head_loss, language_model_loss
torch.set_num_threads(1)
hidden = torch.randn(1, {length}, 64, requires_grad=True)
weight = torch.randn({vocab_size}, 64, requires_grad=True)
targets = torch.randint({vocab_size}, (1, {length}))
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
if "{loss}" == "plain":
    language_model_loss(hidden @ weight.t(), targets).backward()
else:
    head_loss(hidden, weight, targets).backward()
print(status("VmHWM") - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_the_chunked_loss_needs_a_fifth_of_the_memory() -> None:
    assert peak_of("chunked", 65536, 4096) <= 0.2 * peak_of("plain", 65536, 4096)
