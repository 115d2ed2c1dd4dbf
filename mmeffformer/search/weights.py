"""Weights of sub-networks: the ranking of a supernet's channels, and the copy of those kept.

Shapes: C channels of a stage, H hidden channels of a block's MLP.
"""
from fnmatch import fnmatchcase
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from ..models import EfficientFormer
from .subnetwork import Subnetwork
from .supernet import SuperEfficientFormer

# The axes of each tensor, by pattern of its name: C the channels of its stage, P of the previous
# stage, S between the stem's convolutions, H the hidden channels of an MLP. Axes named '-', and
# axes without a name, are never cut. The first pattern that matches counts.
AXES = {
    'stem.0.*': 'S',
    'stem.1.conv.weight': 'CS',
    'stem.1.*': 'C',
    'stages.?.downsample.conv.weight': 'CP',
    'stages.?.downsample.*': 'C',
    '*.layer_scale?': 'C',
    '*.norm?.*': 'C',
    '*.token_mixer.qkv.weight': '-C',
    '*.token_mixer.qkv.bias': '-',
    '*.token_mixer.proj.*': 'C',
    '*.token_mixer.bias.table': '-',
    '*.mlp.expand.weight': 'HC',
    '*.mlp.expand.conv.weight': 'HC',
    '*.mlp.expand.*': 'H',
    '*.mlp.project.weight': 'CH',
    '*.mlp.project.conv.weight': 'CH',
    '*.mlp.project.*': 'C',
    'out_norms.?.*': 'C',
}

Ranking = Dict[str, Tensor]  # by group, the indices of its channels, most important first


def channel_groups(supernet: SuperEfficientFormer) -> Dict[str, List[nn.Module]]:
    """Return the groups of channels that may be cut, and the modules that put each group out.

    Groups are 'stem' (between its convolutions), 'stage.I' (all blocks of a stage add to the
    same channels), and 'hidden.I.J.KIND'.
    """
    groups = {'stem': [supernet.stem[0]]}
    for i, stage in enumerate(supernet.stages):
        groups[f'stage.{i}'] = [supernet.stem if i == 0 else stage.downsample, *stage.blocks]
        for j, path in enumerate(stage.blocks):
            for kind, block in path.branches.items():
                act = block.mlp.act if kind == 'MB3D' else block.mlp.expand
                groups[f'hidden.{i}.{j}.{kind}'] = [act]
    return groups


def rank_channels(supernet: SuperEfficientFormer, losses: Iterable[Callable[[], Tensor]]
                  ) -> Ranking:
    """Rank the channels of every group by how much the losses would change without them.

    To first order the change is |sum over pixels of activation * gradient|, here summed over
    images and over the modules of a group (Molchanov et al., Importance Estimation for Neural
    Network Pruning, 2019). All branches are mixed, so that all are ranked.

    Args:
        losses: Functions that compute the loss of a batch through the supernet.
    """
    sums: Dict[str, Tensor] = {}

    def watch(group: str, out: Tensor) -> None:
        values = out.detach()  # a hook that refers to ``out`` would keep it alive

        def add(gradient: Tensor) -> None:
            product = (values * gradient).double()
            product = product.flatten(2).sum(2) if product.dim() == 4 else product.sum(1)
            sums[group] = sums.get(group, 0) + product.abs().sum(0).cpu()

        out.register_hook(add)

    frozen = [p for p in supernet.parameters() if not p.requires_grad]
    supernet.requires_grad_(True)  # frozen layers are cut as well
    groups = channel_groups(supernet)
    hooks = [module.register_forward_hook(lambda module, args, out, group=group: watch(group, out))
             for group, modules in groups.items() for module in modules]
    try:
        with supernet.mixing(), torch.enable_grad():
            for loss in losses:
                loss().backward()
                supernet.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {group: sums[group].argsort(descending=True, stable=True) for group in groups}


def kept_channels(network: Subnetwork, ranking: Ranking) -> List[Tensor]:
    """Return the indices of the channels of each of the supernet's stages that a network keeps."""
    return [_most_important(ranking[f'stage.{i}'], width)
            for i, width in enumerate(network.widths)]


def _most_important(ranked: Tensor, count: int) -> Tensor:
    return ranked[:count].sort().values


@torch.no_grad()
def extract(supernet: SuperEfficientFormer, network: Subnetwork, ranking: Ranking
            ) -> EfficientFormer:
    """Return a sub-network with the supernet's weights of its most important channels.

    The supernet is not changed.

    Args:
        ranking: The result of :func:`rank_channels`.
    """
    kept, arch = kept_channels(network, ranking), network.arch
    backbone = EfficientFormer(arch, **{**supernet.options, 'init_cfg': None})
    paths = [[(j, kind) for k, j, kind in network.blocks() if k == i] for i in range(len(kept))]
    source, state = supernet.state_dict(), {}
    for key in backbone.state_dict():
        parts = key.split('.')
        stage = int(parts[1]) if parts[0] != 'stem' else 0
        channels = dict(C=kept[stage], P=kept[stage - 1],
                        S=_most_important(ranking['stem'], network.widths[0] // 2))
        if 'blocks' in parts:
            path, kind = paths[stage][int(parts[3])]
            parts[3:4] = [str(path), 'branches', kind]
            channels['H'] = _most_important(ranking[f'hidden.{stage}.{path}.{kind}'],
                                            arch.hidden(stage)[0])
        axes = next(axes for pattern, axes in AXES.items() if fnmatchcase(key, pattern))
        value = source['.'.join(parts)]
        for axis, name in enumerate(axes[:value.dim()]):
            if name in channels:
                value = value.index_select(axis, channels[name].to(value.device))
        state[key] = value
    backbone.load_state_dict(state)
    return revert_sync_batchnorm(backbone).to(value.device)  # a search is one process


class PaddedBackbone(nn.Module):
    """A sub-network that replaces its supernet in a model: channels that were cut are zero.

    Layers after it that are linear in these channels, such as a neck's first convolutions,
    compute the same as without their weights for them.

    Args:
        backbone: The sub-network.
        kept: Its channels of each of the supernet's stages, see :func:`kept_channels`.
        widths: Channels of the supernet's stages.
    """

    def __init__(self, backbone: EfficientFormer, kept: Sequence[Tensor], widths: Sequence[int]):
        super().__init__()
        self.backbone = backbone
        self.kept = [kept[i] for i in backbone.out_indices]
        self.widths = [widths[i] for i in backbone.out_indices]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Return the outputs with the supernet's channels."""
        outs = []
        for out, kept, width in zip(self.backbone(x), self.kept, self.widths):
            if len(kept) < width:
                padded = out.new_zeros(len(out), width, *out.shape[2:]).to(
                    memory_format=torch.channels_last)
                padded[:, kept.to(out.device)] = out
                out = padded
            outs.append(out)
        return tuple(outs)
