"""Pictures of a training run: its learning curve, and a page of drawn images."""
import json
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Sequence

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  after the backend is chosen

MAX_ON_A_PAGE = 64
Curve = Dict[int, float]  # step: value


class Scalars(NamedTuple):
    """Losses and metrics of a run by name, and what the steps of the metrics count."""

    losses: Dict[str, Curve]
    metrics: Dict[str, Curve]
    metric_unit: str


def read_scalars(work_dir: Path) -> Scalars:
    """Return what the training in ``work_dir`` logged, resumed parts put together.

    Raises:
        FileNotFoundError: No training has logged there.
    """
    scalars = Scalars({}, {}, 'iteration')
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        records = list(_records(path))
        trained = [record for record in records if 'loss' in record]
        if not trained:  # an evaluation alone
            continue
        first = trained[0]['step']
        unit = 'epoch' if 'epoch' in trained[0] else 'iteration'
        # What an earlier run logged from here on has been trained anew.
        losses = {k: {s: v for s, v in curve.items() if s < first}
                  for k, curve in scalars.losses.items()}
        kept = max((s for curve in losses.values() for s in curve), default=0)
        scalars = Scalars(losses, scalars.metrics if kept else {}, unit)
        for record in records:
            group = scalars.losses if 'loss' in record else scalars.metrics
            for name, value in record.items():
                if isinstance(value, (int, float)) and (
                        'loss' in name if group is scalars.losses
                        else name not in ('step', 'time', 'data_time')):
                    group.setdefault(name, {})[record['step']] = value
    if not scalars.losses:
        raise FileNotFoundError(f'{work_dir} holds no */vis_data/scalars.json with losses: '
                                'expected the work dir of a training run')
    return scalars


def _records(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed
            return


def learning_curve(work_dir: Path, out: Path) -> None:
    """Plot the losses and the metrics of a training run to ``out``.

    Raises:
        FileNotFoundError: No training has logged into ``work_dir``.
    """
    losses, metrics, metric_unit = read_scalars(work_dir)
    # By size of object there are many, and they say little of how training went.
    metrics = {k: v for k, v in metrics.items() if not k.endswith(('_s', '_m', '_l'))}
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    for ax, curves, title, unit in ((axes[0], losses, 'training loss', 'iteration'),
                                    (axes[1], metrics, 'evaluation', metric_unit)):
        for name, curve in sorted(curves.items()):
            main = name == 'loss' or name.endswith(('mAP_50', 'mIoU'))
            ax.plot([*curve], [*curve.values()], label=name, linewidth=2.2 if main else 1,
                    marker='o' if len(curve) < 30 else None)
        ax.set(title=title, xlabel=unit)
        ax.margins(y=.05)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=.3)
        if curves:
            ax.legend(fontsize=8, ncol=2)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def page(images: Sequence[np.ndarray], out: Path, columns: int = 4) -> None:
    """Save the first ``MAX_ON_A_PAGE`` uint8 RGB images (H, W, 3), ``columns`` to a row."""
    images = images[:MAX_ON_A_PAGE]
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False,
                             layout='constrained')
    for ax in axes.flat:
        ax.axis('off')
    for ax, image in zip(axes.flat, images):
        ax.imshow(image)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)
