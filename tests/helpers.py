"""Functions shared by tests."""
import torch


def image(height: int, width: int, batch: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype,
                       generator=torch.Generator().manual_seed(height * width))


def assert_close(actual, expected, relative: float = 1e-5):
    """Compare lists of tensors, each relative to its largest value."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=relative * b.abs().max().item())


def assert_gradients_close(ours, expected, relative: float = 1e-5, zero_in_training=()):
    """Compare the gradients of a backbone with ``expected``, a twin whose weights are gradients.

    Every one must be more than noise, but for names that end in one of ``zero_in_training``.
    """
    actual = dict(ours.named_parameters())
    floor = 1e-6 * max(p.abs().max().item() for p in expected.parameters())
    for key, gradient in expected.named_parameters():
        largest = gradient.abs().max().item()
        assert largest > floor or key.endswith(tuple(zero_in_training)), key
        torch.testing.assert_close(actual[key].grad, gradient.detach(), rtol=0,
                                   atol=relative * max(largest, floor), msg=key)
