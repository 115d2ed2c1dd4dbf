"""The results of a search: configs and initial weights of the networks found, and a plot."""
from copy import deepcopy
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from ..apis.swap import swap_backbone
from ..latency.table import title
from ..models.arch import ARCHS, Arch, get_arch
from ..utils.config import iter_dicts
from ..utils.files import atomic_write
from ..utils.plots import search_path
from ..utils.registry import MODELS
from .search import Search
from .slimming import Step

MEASURED = 12  # networks of a path, at most


def finish(search: Search, steps: Sequence[Step], others: Mapping[str, Step] = {},
           references: Mapping[str, Optional[float]] = {}, rounds: int = 0) -> Path:
    """Write, measure and plot the networks found.

    Args:
        search: The search.
        steps: Its path.
        others: The networks of its baselines by name.
        references: Named archs to plot for comparison, with their accuracy where it is known.
        rounds: Samples of each network; 0 measures none. Of a long path ``MEASURED`` networks
            are measured.

    Returns:
        The config that trains the last network of the path.
    """
    named = dict(slimmed=steps[-1], **others)
    configs = {name: write_network(search, step, name) for name, step in named.items()}
    shown = {round(i) for i in np.linspace(0, len(steps) - 1, MEASURED)}
    networks = {step.network.key(): step.network.arch
                for step in [*(steps[i] for i in sorted(shown)), *others.values()]}
    networks.update((name, ARCHS[name]) for name in references)
    times = search.measure(networks, rounds)
    _plot(search, steps, others, references, times)
    lines = [f'target {search.target:.3g} ms']
    for name, step in named.items():
        text = (f'{name}: {search.journal.metric} {step.accuracy:.4g} without training, '
                f'{step.ms:.3g} ms by the table')
        if times:
            ms = times[step.network.key()]
            text += f', {ms:.3g} ms measured ({ms / search.target - 1:+.1%} of the target)'
        lines += [text, f'  {arch_dict(step.network.arch)}',
                  f'  train it: python tools/train.py {configs[name]}']
    print_log('\n'.join(lines), logger='current')
    search.journal.save(arch=arch_dict(steps[-1].network.arch), times_ms=times)
    return configs['slimmed']


def _plot(search: Search, steps: Sequence[Step], others: Mapping[str, Step],
          references: Mapping[str, Optional[float]], times: Mapping[str, float]) -> None:
    plotted = {name: (times[name], accuracy) for name, accuracy in references.items() if times}
    plotted.update((step.action, (times.get(step.network.key(), step.ms), step.accuracy))
                   for step in others.values())
    search_path([(step.ms, step.accuracy) for step in steps],
                [(times[step.network.key()], step.accuracy) for step in steps
                 if step.network.key() in times],
                plotted, search.target, search.journal.metric, title(search.table.header),
                search.work_dir / 'path.png')


def write_network(search: Search, step: Step, name: str) -> Path:
    """Write ``NAME.py``, a config that trains a network, and ``NAME.pth``, its initial weights.

    Returns:
        The config.
    """
    network = step.network
    cfg = network_config(search.cfg, network.arch)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    initial = revert_sync_batchnorm(MODELS.build(deepcopy(cfg.model)))
    with search.evaluation.installed(network) as model:
        state = network_state(model, initial.state_dict())
    weights, config = (search.work_dir / f'{name}{suffix}' for suffix in ('.pth', '.py'))
    meta = dict(arch=arch_dict(network.arch), choices=network.key(), predicted_ms=step.ms,
                accuracy=step.accuracy)
    with atomic_write(weights) as tmp_path:
        torch.save(dict(state_dict=state, meta=meta), tmp_path)
    cfg.load_from = str(weights)
    cfg.pop('work_dir', None)
    with atomic_write(config) as tmp_path:
        cfg.dump(str(tmp_path))
    return config


def arch_dict(arch: Arch) -> Dict[str, list]:
    """Return an arch as the dict of a config."""
    return dict(widths=list(arch.widths), depths=list(arch.depths),
                attention_blocks=list(arch.attention_blocks))


def network_config(cfg: Config, arch: Arch) -> Config:
    """Return a supernet's config with a sub-network as its backbone.

    Neck and heads get the sub-network's channels (:func:`swap_backbone`). Settings that only a
    supernet needs are removed; all others stay, the schedule too.

    Args:
        cfg: The config of a model of mmdet, mmseg or mmpretrain. It is not changed.
    """
    backbone = {key: value for key, value in cfg.model.backbone.items()
                if key not in ('arch', 'attention_stages', 'init_cfg')}
    backbone.update(type='mmeffformer.EfficientFormer', arch=arch_dict(arch))
    if cfg.get('default_scope') == 'mmpretrain':
        result, widths = deepcopy(cfg), get_arch(cfg.model.backbone.arch, ARCHS).widths
        for part in iter_dicts(result.model):
            if part.get('in_channels') == widths[-1]:
                part.in_channels = arch.widths[-1]
    else:
        result = swap_backbone(cfg, backbone['arch'])
        backbone['out_indices'] = tuple(result.model.backbone.out_indices)
        # The supernet's is right already.
        result.model.data_preprocessor = deepcopy(cfg.model.get('data_preprocessor'))
    result.model.backbone = backbone
    result.load_from, result.resume = None, False
    result.custom_hooks = [hook for hook in result.get('custom_hooks') or []
                           if not str(hook['type']).endswith('TemperatureHook')]
    result.pop('find_unused_parameters', None)
    options = result.get('optim_wrapper', {}).get('paramwise_cfg') or {}
    options.get('custom_keys', {}).pop('importance', None)
    return result


def network_state(model: nn.Module, initial: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Return the weights of a model, without those for channels that its backbone has lost.

    Where the shapes of a layer after the backbone do not identify the stage that it reads, its
    weights come from ``initial``, which is logged.

    Args:
        model: A model whose backbone is a :class:`PaddedBackbone`.
        initial: The initial state dict of the model with the sub-network.
    """
    padded = model.backbone
    cuts: Dict[Tuple[int, int], List[Tensor]] = {}  # kept channels by numbers before and after
    for kept, width in zip(padded.kept, padded.widths):
        cuts.setdefault((width, len(kept)), []).append(kept)
    state = {f'backbone.{key}': value for key, value in padded.backbone.state_dict().items()}
    old, not_cut = model.state_dict(), []
    for key, target in initial.items():
        if key.startswith('backbone.'):
            continue
        value = _cut(old[key], target.shape, cuts) if key in old else None
        if value is None:
            not_cut.append(key)
            value = target
        state[key] = value
    if not_cut:
        print_log(f'{len(not_cut)} tensors of the new model could not be cut from the supernet\'s '
                  f'model and keep their initial values: {", ".join(not_cut)}', logger='current')
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def _cut(value: Tensor, shape: Sequence[int], cuts: Mapping[Tuple[int, int], List[Tensor]]
         ) -> Optional[Tensor]:
    """Return ``value`` cut to ``shape``, or None where the channels to keep are not clear."""
    if value.dim() != len(shape):
        return None
    for axis, sizes in enumerate(zip(value.shape, shape)):
        if sizes[0] != sizes[1]:
            choices = cuts.get(sizes, [])
            if len(choices) != 1:
                return None
            value = value.index_select(axis, choices[0].to(value.device))
    return value
