"""Messages on the console."""
import logging
import subprocess
import sys

from mmengine.logging import print_log


def test_onedl_message_is_dropped(capsys):
    print_log('Could not import OneDL. Skipping OneDL datasets.', level=logging.DEBUG)
    print_log('Could not import another package', level=logging.DEBUG)
    assert capsys.readouterr().out == 'Could not import another package\n'


def test_libraries_print_nothing_on_import():
    code = 'import mmeffformer, mmdet.datasets, mmseg.datasets, mmpretrain.datasets'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True, check=True,
                          capture_output=True)
    assert done.stdout == ''
