"""Shows a docstring's references, such as ``:func:`load_weights` ``, as code on the site."""
import re

from griffe import Extension


class Roles(Extension):

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = re.sub(r':(?:py:)?\w+:`~?([^`]+)`', r'`\1`', obj.docstring.value)
