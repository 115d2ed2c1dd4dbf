"""Options and config loading shared by the tools."""
from argparse import ArgumentParser

import pytest
from mmengine.config import Config
from mmengine.registry import Registry

from mmeffformer.apis.options import (
    add_config_arguments,
    exit_on_error,
    load_config,
)
from mmeffformer.engine.configs import set_data_root


def parse(*words):
    parser = ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args(map(str, words))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'some_config.py'
    path.write_text("model = dict()\ndata_root = 'data/coco/'\n"
                    "a = dict(b=[dict(root=data_root, file=data_root + 'x.json')])\n"
                    "other = 'data/coco2017/x.json'\nkeep = dict(n=1, f='data/coco')\n")
    return path


def test_work_dir_is_named_after_the_config_unless_given(config):
    assert load_config(parse(config)).work_dir == 'work_dirs/some_config'
    assert load_config(parse(config, '--work-dir', 'here')).work_dir == 'here'
    cfg = load_config(parse(config, '--cfg-options', 'work_dir=there', 'a.c=3'))
    assert cfg.work_dir == 'there' and cfg.a.c == 3


def test_data_root_is_replaced_wherever_a_value_starts_with_it(config):
    cfg = load_config(parse(config, '--data-root', '/mnt/coco'))
    assert cfg.data_root == '/mnt/coco/'
    assert cfg.a.b[0] == dict(root='/mnt/coco/', file='/mnt/coco/x.json')
    assert cfg.other == 'data/coco2017/x.json'
    assert cfg.keep.n == 1
    cfg = load_config(parse(config, '--data-root', '/mnt', '--cfg-options', 'a.b.0.root=mine'))
    assert cfg.a.b[0].root == 'mine' and cfg.a.b[0].file == '/mnt/x.json'


def test_errors_of_configs():
    with pytest.raises(ValueError, match='has no data_root to replace'):
        set_data_root(Config(dict(model=dict())), '/mnt')
    with pytest.raises(FileNotFoundError, match="config 'nope.py' does not exist"):
        load_config(parse('nope.py'))


def test_errors_for_options_that_do_not_match(config, capsys):
    with pytest.raises(SystemExit):
        parse(config, '--cfg-options', 'a.c=1', 'nonsense')
    assert "--cfg-options: expected KEY=VALUE, got 'nonsense'" in capsys.readouterr().err
    for option in ('a.b.9.root=x', 'keep.n.x=1'):
        with pytest.raises(ValueError, match=f'{option[:5]}.* do not match .*some_config.py'):
            load_config(parse(config, '--cfg-options', option))


@pytest.mark.parametrize('launcher, rank', [
    ('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')])
def test_error_for_a_process_without_a_job(launcher, rank, config, monkeypatch):
    monkeypatch.delenv(rank, raising=False)
    with pytest.raises(ValueError, match=f'--launcher {launcher}: {rank} is not in the env'):
        load_config(parse(config, '--launcher', launcher))


class Strict:
    def __init__(self, *, interval=1):
        pass


class Forwarding:
    def __init__(self, **options):
        Strict(**options)


class Broken:
    def __init__(self):
        Strict(interwall=1)


@pytest.mark.parametrize('cfg, message', [
    (dict(type='Strict', intervall=1), "unexpected keyword argument 'intervall'"),
    (dict(type='Strickt'), 'Strickt is not in the nowhere::a hook registry'),
    (dict(interval=1), 'must contain the key "type"')])
def test_exit_on_error_reports_errors_of_a_config(cfg, message, monkeypatch):
    monkeypatch.setattr('sys.argv', ['tools/train.py'])
    hooks = Registry('a hook', scope='nowhere')
    hooks.register_module(module=Strict)
    with pytest.raises(SystemExit) as info, exit_on_error():
        hooks.build(cfg)
    assert info.value.code.startswith('train.py: invalid config: ')
    assert message in info.value.code


@pytest.mark.parametrize('cfg, message', [
    (dict(type='Broken'), 'interwall'), (dict(type='Forwarding', intervall=1), 'intervall')])
def test_exit_on_error_keeps_the_traceback_of_errors_in_code(cfg, message):
    hooks = Registry('another hook', scope='nowhere')
    for kind in (Broken, Forwarding):
        hooks.register_module(module=kind)
    with pytest.raises(TypeError, match=message), exit_on_error():
        hooks.build(cfg)
    with pytest.raises(KeyError), exit_on_error():
        raise KeyError('a mistake in the code')
    with pytest.raises(SystemExit, match='no such arch'), exit_on_error():
        raise ValueError('no such arch')


def test_data_root_that_replaces_nothing(config):
    config.write_text("model = dict()\ndata_root = 'data/coco/'\n"
                      "train_dataloader = dict(dataset=dict(data_root='elsewhere/'))\n")
    with pytest.raises(ValueError, match="no path of .*some_config.py starts with its data_root "
                                         "'data/coco/', so nothing would change"):
        load_config(parse(config, '--data-root', '/mnt'))


def test_paths_with_backslashes(config):
    config.write_text("model = dict()\ndata_root = 'D:\\\\coco\\\\'\n"
                      "a = dict(root=data_root, file=data_root + 'train\\\\x.json')\n")
    assert load_config(parse(config, '--data-root', '/mnt/coco')).a == dict(
        root='/mnt/coco/', file='/mnt/coco/train/x.json')
    config.write_text("model = dict()\nval_dataloader = dict(dataset=dict(ann_file='a\\train'))")
    with pytest.raises(ValueError, match=r"ann_file 'a\\train' has control characters.* with /"):
        load_config(parse(config))
    config.write_text("model = dict()\ndata_root = 'C:\\Users'\n")
    with pytest.raises(ValueError, match=r'invalid Python: .*unicodeescape.*write paths with /'):
        load_config(parse(config))


@pytest.mark.parametrize('text, old', [
    ('data = dict(train=dict())\noptimizer = dict(type="SGD")', 'data, optimizer'),
    ('runner = dict(type="EpochBasedRunner")', 'runner')])
def test_configs_of_mmdet_2_and_mmseg_0_are_named(config, text, old):
    config.write_text(f'model = dict()\n{text}\n')
    with pytest.raises(ValueError, match=f'as its keys {old} show: expected one of mmdet 3.x or '
                                         'mmseg 1.x.*config_migration.html'):
        load_config(parse(config))
    config.write_text(f'model = dict()\n{text}\ntrain_dataloader = dict()\n')
    assert load_config(parse(config)).train_dataloader == {}


def test_broken_bases_are_one_message(config):
    for text in ('_base_ = unknown', 'from mmengine.config import read_base\nwith read_base():\n'
                 '    from .none import *'):
        config.write_text(text)
        with pytest.raises((ValueError, OSError), match='some_config.py|none'):
            load_config(parse(config))


def test_imported_types_become_names(repo_root, tmp_path):
    path = repo_root / 'tests/data/new_style/faster_rcnn.py'
    cfg = load_config(parse(path, '--data-root', '/mnt', '--cfg-options',
                            'model.roi_head.type=DoubleHeadRoIHead'))
    assert cfg.default_scope == 'mmdet' and cfg.model.roi_head.type == 'DoubleHeadRoIHead'
    assert cfg.model.backbone.type == 'mmeffformer.EfficientFormer'
    assert cfg.model.test_cfg.rcnn.nms.type == 'nms'
    assert cfg.test_dataloader.dataset.data_root == '/mnt/'
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()
    # mmcv's transform has the name of mmseg's own.
    cfg = load_config(parse(path.with_name('semfpn.py')))
    assert cfg.test_dataloader.dataset.pipeline[1].type == 'mmengine.Resize'
