"""Hooks for the training of a supernet."""
from mmengine.hooks import Hook

from ...utils.modules import unwrap_model
from ...utils.registry import HOOKS


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Lower the temperature of a supernet's mixtures geometrically during training.

    At first every batch trains all branches of a block, at the end nearly one branch, as in the
    network that is chosen later. The schedule is that of Jang et al., Categorical
    Reparameterization with Gumbel-Softmax, 2017.

    Args:
        start, end: Temperature at the first and at the last iteration.

    Raises:
        ValueError: Not ``0 < end <= start``.
    """

    def __init__(self, start: float = 1., end: float = 0.1):
        if not 0 < end <= start:
            raise ValueError(f'temperatures from {start!r} to {end!r}: expected 0 < end <= start')
        self.start, self.end = start, end

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        progress = runner.iter / max(1, runner.max_iters - 1)
        temperature = self.start * (self.end / self.start) ** progress
        unwrap_model(runner.model).backbone.set_temperature(temperature)
