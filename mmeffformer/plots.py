"""Pictures of a training run: its learning curve, and a page of drawn images."""
import json
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402  after the backend is chosen

Series = Tuple[List[int], List[float]]


def read_scalars(work_dir: Path) -> Dict[str, Series]:
    """Return {name: (steps, values)} of the newest run that logged into ``work_dir``.

    Raises:
        FileNotFoundError: No run has logged there.
    """
    logs = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(f'{work_dir} holds no */vis_data/scalars.json: expected the '
                                'work dir of a training run')
    series: Dict[str, Series] = {}
    for line in logs[-1].read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ('step', 'iter', 'epoch') and isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record.get('step', record.get('iter', len(steps))))
                values.append(value)
    return series


def learning_curve(work_dir: Path, out: Path) -> None:
    """Plot the losses over iterations and the metrics over epochs of a run to ``out``."""
    series = read_scalars(work_dir)
    losses = {k: v for k, v in series.items() if 'loss' in k}
    metrics = {k: v for k, v in series.items() if '/' in k}
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    for ax, lines, title, unit in ((axes[0], losses, 'training loss', 'iteration'),
                                   (axes[1], metrics, 'evaluation', 'epoch')):
        for name, (steps, values) in sorted(lines.items()):
            wide = name == 'loss' or name.endswith(('mAP_50', 'mIoU'))
            ax.plot(steps, values, label=name, marker='.' if ax is axes[1] else None,
                    linewidth=2.2 if wide else 1)
        ax.set(title=title, xlabel=unit)
        ax.grid(alpha=.3)
        if lines:
            ax.legend(fontsize=8, ncol=2)
    axes[1].set_ylim(0, 1)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def page(images: Sequence[np.ndarray], out: Path, columns: int = 4) -> None:
    """Save uint8 RGB images (H, W, 3) side by side, ``columns`` to a row, as ``out``."""
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
