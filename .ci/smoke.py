"""Smoke test of an installation: ``python .ci/smoke.py`` from a folder outside the source tree."""
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from mmengine import Config, hub

import mmeffformer

package = Path(mmeffformer.__file__).parent
assert package.is_relative_to(sys.prefix), f'{package} is not in {sys.prefix}'
assert version('mmeffformer') == mmeffformer.__version__
assert (package / 'py.typed').is_file()

backbone = mmeffformer.EfficientFormer('l1', out_norm_cfg=None).eval()
with torch.inference_mode():
    shapes = [tuple(out.shape) for out in backbone(torch.zeros(1, 3, 64, 96))]
assert shapes == [(1, 48, 16, 24), (1, 96, 8, 12), (1, 224, 4, 6), (1, 448, 2, 3)], shapes

mmeffformer.patch_mmengine()  # mmengine then finds configs of mmeffformer
config = hub.get_config('mmeffformer::detection/maskrcnn_effformer_l7.py')
assert config.model.neck.in_channels == [96, 192, 384, 768]
with TemporaryDirectory() as folder:
    child = Path(folder, 'child.py')
    child.write_text("_base_ = 'mmeffformer::detection/maskrcnn_effformer_l3.py'\n"
                     "model = dict(backbone=dict(norm_eval=True))\n")
    backbone = Config.fromfile(child).model.backbone
assert backbone.arch == 'l3' and backbone.norm_eval

subprocess.run([sys.executable, '-m', 'mmeffformer', 'doctor'], check=True)
subprocess.run([sys.executable, package / '.mim/tools/train.py', '--help'], check=True,
               stdout=subprocess.DEVNULL)
print(f'mmeffformer {mmeffformer.__version__} works in {sys.prefix}')
