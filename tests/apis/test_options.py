"""Options and configs that the tools share."""
from argparse import ArgumentParser

import pytest
from mmengine.config import Config
from mmengine.registry import Registry

from mmeffformer.apis.options import (
    add_config_arguments,
    exit_on_error,
    load_config,
    set_data_root,
)


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


def test_options_given_by_hand_win_over_data_root(config):
    cfg = load_config(parse(config, '--data-root', '/mnt', '--cfg-options', 'a.b.0.root=mine'))
    assert cfg.a.b[0].root == 'mine' and cfg.a.b[0].file == '/mnt/x.json'


def test_config_without_data_root_is_explained():
    with pytest.raises(ValueError, match='has no data_root to replace'):
        set_data_root(Config(dict(model=dict())), '/mnt')


def test_missing_config_is_explained():
    with pytest.raises(FileNotFoundError, match="config 'nope.py' does not exist"):
        load_config(parse('nope.py'))


def test_options_without_a_value_or_a_place_are_explained(config, capsys):
    with pytest.raises(SystemExit):
        parse(config, '--cfg-options', 'a.c=1', 'nonsense')
    assert "--cfg-options: 'nonsense' is no KEY=VALUE" in capsys.readouterr().err
    for option in ('a.b.9.root=x', 'keep.n.x=1'):
        with pytest.raises(ValueError, match=f'some_config.py has no place .*{option[:5]}'):
            load_config(parse(config, '--cfg-options', option))


@pytest.mark.parametrize('launcher, rank', [
    ('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')])
def test_processes_of_no_job_are_explained(launcher, rank, config, monkeypatch):
    monkeypatch.delenv(rank, raising=False)
    with pytest.raises(ValueError, match=f'--launcher {launcher}: {rank} is not in the env'):
        load_config(parse(config, '--launcher', launcher))


def test_no_environment_is_needed(config, monkeypatch):
    monkeypatch.delenv('PATH')
    assert load_config(parse(config)).launcher == 'none'


def test_explained_tells_what_a_config_gets_wrong(monkeypatch):
    monkeypatch.setattr('sys.argv', ['tools/train.py'])

    class Whole:
        def __init__(self, *, interval=1):
            pass

    class Derived(Whole):
        def __init__(self, **options):
            super().__init__(**options)

    class Broken:
        def __init__(self):
            raise TypeError('a mistake of ours')

    class Confused:
        def __init__(self):
            Whole(interwall=1)

    hooks = Registry('a hook', scope='nowhere')
    for kind in (Whole, Derived, Broken, Confused):
        hooks.register_module(module=kind)
    for cfg, said in [(dict(type='Whole', intervall=1), 'intervall'),
                      (dict(type='Derived', intervall=1), 'intervall'),
                      (dict(type='Hole'), 'Hole is not in the')]:
        with pytest.raises(SystemExit, match=f'^train.py: the config .*{said}'), exit_on_error():
            hooks.build(cfg)
    for kind, said in [('Broken', 'a mistake of ours'), ('Confused', 'interwall')]:
        with pytest.raises(TypeError, match=said), exit_on_error():
            hooks.build(dict(type=kind))


def test_explained_keeps_the_message_and_only_of_what_users_give(capsys):
    with pytest.raises(SystemExit, match='no such arch'), exit_on_error():
        raise ValueError('no such arch')
    with pytest.raises(KeyError), exit_on_error():
        raise KeyError('a mistake of ours')
