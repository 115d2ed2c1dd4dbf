"""Jobs of several processes: how they start and end, and models divided among them.

FSDP here is torch's second, ``fully_shard``: it runs on CPUs too, and leaves a model's modules,
and the names of its parameters, as they are. The first, which mmengine wraps, does neither.
"""
import ctypes
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Iterator, Sequence, Union

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.model import MMDistributedDataParallel
from mmengine.model import revert_sync_batchnorm as synchronised
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from ..models.layers import ScaledBlock
from ..utils.registry import MODEL_WRAPPERS

try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch before 2.6
    fully_shard = None


def end_with_launcher() -> None:
    """From here on, end this process when the one that started it does, however it does.

    A rank whose launcher was killed would go on training, unseen, or wait for the others.
    """
    if sys.platform == 'linux':
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_on_cpus(cfg: Config) -> None:
    """Join the processes of a job on CPUs, which mmengine does for GPUs only, and make ``cfg``
    wrap its model for them.

    ``env_cfg.dist_cfg.timeout`` in the config is how many seconds one process waits for
    the others, as on GPUs; without it torch's 30 minutes.

    Raises:
        ValueError: The timeout is no positive number.
    """
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    if timeout is None:
        options = {}
    elif isinstance(timeout, (int, float)) and timeout > 0:
        options = dict(timeout=timedelta(seconds=timeout))
    else:
        raise ValueError(f'env_cfg.dist_cfg.timeout={timeout!r}: expected seconds, more than 0')
    dist.init_process_group('gloo', **options)
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if wrapper.get('type', 'MMDistributedDataParallel') == 'MMDistributedDataParallel':
        cfg.model_wrapper_cfg = {
            'broadcast_buffers': False,
            'find_unused_parameters': cfg.get('find_unused_parameters', False),
            **wrapper, 'type': 'mmeffformer.DataParallelOnCPUs'}


@MODEL_WRAPPERS.register_module()
class DataParallelOnCPUs(MMDistributedDataParallel):
    """mmengine's, for CPUs, where SyncBN is synchronised as well."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs):
        super().__init__(synchronised(module), **kwargs)


@MODEL_WRAPPERS.register_module()
class FullyShardedDataParallel(nn.Module):
    """A model of which each process keeps a part of every weight, gradient and moment (FSDP).

    The whole weights exist while they compute only. A :class:`mmeffformer.engine.runner.Runner`
    saves and loads whole checkpoints, the same as without FSDP. For large models::

        model_wrapper_cfg = dict(type='mmeffformer.FullyShardedDataParallel')

    Args:
        module: A detector or segmentor, on its device. Its weights are initialised here,
            because afterwards no process has them whole.
        units: Class names of further modules whose weights are gathered one by one, such as
            ``['Bottleneck']``; this project's backbones are, block by block, and what is left
            of the model is gathered at once. They must be called, not only their methods.
        reshard_after_forward: Let go of a unit's weights after forward, and gather them again
            in backward.
        **kwargs: Others of ``torch.distributed.fsdp.fully_shard``.

    Raises:
        ValueError: torch is too old, or ``units`` names a class the model has no module of.
    """

    def __init__(self, module: nn.Module, units: Sequence[str] = (),
                 reshard_after_forward: bool = True, **kwargs):
        super().__init__()
        if fully_shard is None:
            raise ValueError('FullyShardedDataParallel needs torch 2.6 or newer, and this is '
                             f'{torch.__version__}; leave model_wrapper_cfg out of the config')
        classes = {type(part).__name__ for part in module.modules()}
        if missing := {*units} - classes:
            raise ValueError(f'units={[*units]}: the model has no {", ".join(sorted(missing))}; '
                             f'it has {", ".join(sorted(classes))}')
        if hasattr(module, 'init_weights'):
            module.init_weights()
        for value in module.state_dict().values():
            dist.broadcast(value, 0)
        if get_device() == 'cpu':
            synchronised(module)
        mesh = init_device_mesh(get_device(), (dist.get_world_size(),))
        self.reshard_after_forward = reshard_after_forward
        self.units = [part for part in module.modules()  # a list: its modules are the module's
                      if isinstance(part, ScaledBlock) or type(part).__name__ in units]
        for unit in self.units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward, **kwargs)
        self.module = fully_shard(module, mesh=mesh, **kwargs)
        module.register_load_state_dict_pre_hook(_divide_weights)

    def train(self, mode: bool = True) -> 'FullyShardedDataParallel':
        for unit in self.units:
            # In inference, processes may run a block of theirs more often than others do.
            unit.set_reshard_after_forward(mode and self.reshard_after_forward, recurse=False)
        return super().train(mode)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    # mmengine's models do these through their own ``forward``.
    def train_step(self, data, optim_wrapper: OptimWrapper) -> dict:
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data) -> list:
        return self.module.val_step(data)

    def test_step(self, data) -> list:
        return self.module.test_step(data)


class Sharding:
    """What a Runner does otherwise with a :class:`FullyShardedDataParallel`. It stands before
    mmengine's among the bases of a class."""

    def _init_model_weights(self):
        if not isinstance(self.model, FullyShardedDataParallel):
            super()._init_model_weights()

    def build_optim_wrapper(self, optim_wrapper):
        optim_wrapper = super().build_optim_wrapper(optim_wrapper)
        if isinstance(self.model, FullyShardedDataParallel):
            for optimizer in _optimizers(optim_wrapper):
                optimizer.register_load_state_dict_pre_hook(_divide_moments)
        return optim_wrapper

    @contextmanager
    def gathered(self, optimizer: bool = True) -> Iterator[None]:
        """Within, the main process can save the model, and the optimizer, as a whole.

        All processes have to enter. Without FSDP, nothing is to be done.
        """
        if not isinstance(self.model, FullyShardedDataParallel):
            yield
            return
        weights, hooks = _whole(self.model.module.state_dict()), []
        hooks.append(self.model.module.register_state_dict_post_hook(
            lambda module, state_dict, prefix, metadata: state_dict.update(
                (key, weights[key]) for key in [*state_dict] if key in weights)))
        for part in _optimizers(self.optim_wrapper) if optimizer else ():
            state = _whole(part.state_dict())
            hooks.append(part.register_state_dict_post_hook(lambda *_, state=state: state))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _optimizers(wrapper: Union[OptimWrapper, OptimWrapperDict]) -> list:
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return [wrapper.optimizer for wrapper in wrappers]


def _whole(state: Any) -> Any:
    """Return nested values with every divided tensor whole on the CPU of the main process."""
    if isinstance(state, DTensor):
        state = state.full_tensor()
        return state.cpu() if is_main_process() else None
    if isinstance(state, dict):
        return {key: _whole(value) for key, value in state.items()}
    return [_whole(value) for value in state] if isinstance(state, list) else state


def _part(value: Any, parameter: Tensor) -> Any:
    """Return this process's part of a whole tensor, divided as the parameter is."""
    if (isinstance(value, Tensor) and not isinstance(value, DTensor)
            and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements,
                                 src_data_rank=None)  # every process has read the whole
    return value


def _divide_weights(module: nn.Module, state_dict: dict, prefix: str, *_):
    for name, parameter in module.named_parameters():
        if prefix + name in state_dict:
            state_dict[prefix + name] = _part(state_dict[prefix + name], parameter)


def _divide_moments(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    numbers = [i for group in state_dict['param_groups'] for i in group['params']]
    state = {number: {key: _part(value, parameter)
                      for key, value in state_dict['state'].get(number, {}).items()}
             for number, parameter in zip(numbers, parameters)}
    return dict(state_dict, state={number: moments for number, moments in state.items()
                                   if moments})
