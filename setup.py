"""Installs mmeffformer; configs and tools go along as ``mmeffformer/.mim``.

mmengine, mmcv, mmdet and mmseg exist as the originals and as maintained forks
with the same import names, so none is required by name here: one of the extras
``onedl`` and ``openmmlab`` brings them.
"""
import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Puts what ``mim`` and ``mmengine.hub`` look for where they look for it:
    copies into a wheel, links into the source tree of an editable install."""

    def run(self):
        super().run()
        linked = getattr(self, 'editable_mode', False)
        mim = (ROOT if linked else Path(self.build_lib)) / 'mmeffformer' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in SHIPPED:
            if linked:
                (mim / name).symlink_to(os.path.relpath(ROOT / name, mim))
            elif (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, mim / name,
                                ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(ROOT / name, mim / name)


setup(
    name='mmeffformer',
    version=re.search(r"'(.+)'", (ROOT / 'mmeffformer/version.py').read_text())[1],
    description='EfficientFormer for dense prediction on OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    keywords=['EfficientFormer', 'object detection', 'instance segmentation',
              'semantic segmentation', 'OpenMMLab', 'mmdetection', 'mmsegmentation'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['mmeffformer', 'mmeffformer.*']),
    package_data={'mmeffformer': ['py.typed']},
    cmdclass={'build_py': BuildWithMim},
    install_requires=['torch>=2.1', 'torchvision>=0.16', 'numpy', 'rich', 'safetensors',
                      'huggingface_hub'],
    extras_require={
        'onedl': ['onedl-mmengine>=0.10.12', 'onedl-mmcv>=2.3.6', 'onedl-mmdetection>=3.5.1',
                  'onedl-mmsegmentation>=1.4.2', 'onedl-mmpretrain>=1.3.6'],
        'openmmlab': ['mmengine>=0.10.4', 'mmcv-lite>=2.1,<2.2', 'mmdet>=3.3',
                      'mmsegmentation>=1.2.2', 'mmpretrain>=1.2', 'ftfy', 'regex', 'numpy<2',
                      'opencv-python<4.12', 'setuptools<81'],
        'export': ['onnx>=1.16', 'onnxruntime>=1.18', 'openvino>=2024.4', 'nncf>=2.14',
                   'coremltools>=8', 'scipy'],
        # 1.5 exports files that its own runtime cannot run.
        'executorch': ['executorch>=1.3.1,<1.4'],
        'data': ['supervision>=0.31'],
        'test': ['pytest', 'pytest-xdist', 'hypothesis', 'ruff', 'mypy', 'import-linter', 'build',
                 'timm', 'transformers>=4.46,<5', 'supervision>=0.31'],
        'docs': ['mkdocs-material>=9.7', 'mkdocstrings-python>=2'],
    },
)
