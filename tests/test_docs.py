"""Commands and Python code in README.md and docs/: options, imports and doctests."""
import ast
import doctest
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md')]
PAGES += sorted([*ROOT.glob('docs/**/*.md'), *ROOT.glob('configs/*/README.md')])
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding='utf-8') for path in PAGES}
COMMAND = re.compile(r'python (tools/\S+\.py|-m mmeffformer)\b([^\n`]*)')
COMMANDS = sorted({f'{tool} {arguments.strip()}' for text in TEXTS.values()
                   for tool, arguments in COMMAND.findall(re.sub(r'\s*\\\n\s*', ' ', text))
                   if arguments.strip()})
BLOCKS = [pytest.param(block, id=f'{name}-{number}') for name, text in TEXTS.items()
          for number, block in enumerate(re.findall(r'^```python\n(.*?)^```', text, re.M | re.S))]


class Parsed(BaseException):
    """Raised instead of running a command whose options were parsed."""


@pytest.mark.parametrize('command', COMMANDS, ids=str)
def test_tools_parse_the_commands(command, monkeypatch):
    tool, *arguments = shlex.split(command.removeprefix('-m '), comments=True)
    parse_args = ArgumentParser.parse_args
    assert all((ROOT / word).is_file() for word in arguments if word.startswith('configs/'))

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ArgumentParser, 'parse_args', stop)
    monkeypatch.setattr(sys, 'argv', [tool, *arguments])
    with pytest.raises(Parsed):
        if tool.endswith('.py'):
            runpy.run_path(tool, run_name='__main__')
        else:
            runpy.run_module(tool, run_name='__main__')


def test_every_tool_has_a_command():
    tools = {path.relative_to(ROOT).as_posix() for path in ROOT.glob('tools/**/*.py')}
    assert tools <= {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize('block', BLOCKS)
def test_python_code(block):
    test = doctest.DocTestParser().get_doctest(block, {}, 'docs', None, 0)
    if test.examples:
        assert doctest.DocTestRunner().run(test).failed == 0
        return
    for node in ast.parse(block).body:  # the rest needs files
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(ast.unparse(node), {})
