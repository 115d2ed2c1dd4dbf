"""``mmcv._ext`` as mmeffformer provides it, and the diagnosis of the operators in use."""
import os
import subprocess
import sys
from pathlib import Path

import mmcv._ext as extension
import pytest
import torch
from mmcv.ops import (
    nms_match,
    roi_pool,
    softmax_focal_loss,
)
from support.operators import COMPILED, stand_ins_only

from mmeffformer import ops


@stand_ins_only
@pytest.mark.parametrize('name, call', [
    ('nms_match', lambda: nms_match(torch.rand(3, 5), .5)),
    ('roi_pool_forward', lambda: roi_pool(torch.rand(1, 2, 4, 4), torch.zeros(1, 5), 2)),
    ('softmax_focal_loss_forward',
     lambda: softmax_focal_loss(torch.rand(2, 3), torch.tensor([0, 1]))),
])
def test_other_operators_raise_when_called(name, call):
    with pytest.raises(NotImplementedError, match=f"'{name}' needs mmcv with compiled operators"):
        call()


def test_extension_in_use():
    before = list(sys.meta_path)
    ops.install()  # once more
    assert sys.meta_path == before
    assert [type(f).__module__ for f in before].count('mmeffformer.ops') == 1
    assert COMPILED == (Path(extension.__file__).parent != Path(ops.__file__).parent)
    assert ops.diagnose() == ('compiled' if COMPILED else 'torchvision', extension.__file__)
    # Names of Python are not operators.
    assert not hasattr(extension, '__wrapped__') and not hasattr(extension, '_private')


def diagnose_with(folder, flags=()):
    """Return the diagnosis of a new interpreter in which ``folder`` comes first."""
    code = ('import sys, types\n'
            'package = sys.modules["mmeffformer"] = types.ModuleType("mmeffformer")\n'
            f'package.__path__ = [{str(Path(ops.__file__).parents[1])!r}]\n'  # no __init__.py run
            'from mmeffformer import ops\n'
            'ops.install()\n'
            'assert "torch" not in sys.modules and "mmcv" not in sys.modules\n'
            'print(*ops.diagnose())')
    return subprocess.run([sys.executable, *flags, '-c', code], check=True, text=True,
                          capture_output=True, cwd=folder,
                          env={**os.environ, 'PYTHONPATH': str(folder)}).stdout.strip()


@pytest.mark.parametrize('content, answer', [
    ('nms = None', 'compiled {}'),
    ('raise OSError("undefined symbol: nms")', 'broken OSError: undefined symbol: nms')])
def test_diagnosis_of_an_mmcv(tmp_path, content, answer):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / '_ext.py').write_text(content)
    assert diagnose_with(tmp_path).startswith(answer.format(package / '_ext.py'))


def test_diagnosis_without_mmcv(tmp_path):
    assert diagnose_with(tmp_path, ['-I', '-S']) == 'absent'
