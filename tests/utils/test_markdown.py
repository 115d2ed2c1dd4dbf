"""Markdown tables."""
from mmeffformer.utils.markdown import markdown_table


def test_first_column_is_left_and_bars_are_replaced():
    assert markdown_table(['a', 'b'], [['x', '1'], ['y|z', '2']]) == (
        '| a | b |\n| --- | ---: |\n| x | 1 |\n| y/z | 2 |')
