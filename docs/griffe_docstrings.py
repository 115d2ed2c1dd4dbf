"""Prepares docstrings for the API reference."""
import re

from griffe import Extension


class Docstrings(Extension):

    def on_object(self, *, obj, **kwargs):
        """Show references, such as ``:func:`load_weights` ``, as code."""
        if obj.docstring:
            obj.docstring.value = re.sub(r':(?:py:)?\w+:`~?([^`]+)`', r'`\1`', obj.docstring.value)

    def on_package(self, *, pkg, **kwargs):
        """Show what a room imports from its own modules there only, not twice."""
        for room in pkg.modules.values():
            room.exports = [name for name in room.exports or () if not room[name].is_alias]
