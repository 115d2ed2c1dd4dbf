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
        step = record.pop('step')
        for name, value in record.items():
            if isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return series


def learning_curve(work_dir: Path, out: Path) -> None:
    """Plot the losses and the metrics of a run over its iterations (metrics over epochs
    where the run counts in epochs) to ``out``.

    Raises:
        FileNotFoundError: No run has logged into ``work_dir``.
    """
    series = read_scalars(work_dir)
    panels = (
        ('training loss', 'iteration', {k: v for k, v in series.items() if 'loss' in k}),
        ('evaluation', 'epoch' if 'epoch' in series else 'iteration', {
            k: v for k, v in series.items() if '/' in k and not k.endswith(('_s', '_m', '_l'))}))
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    for ax, (title, unit, lines) in zip(axes, panels):
        for name, (steps, values) in sorted(lines.items()):
            main = name == 'loss' or name.endswith(('mAP_50', 'mIoU'))
            ax.plot(steps, values, label=name, linewidth=2.2 if main else 1,
                    marker='o' if len(steps) < 30 else None)
        ax.set(title=title, xlabel=unit)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=.3)
        if lines:
            ax.legend(fontsize=8, ncol=2)
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
