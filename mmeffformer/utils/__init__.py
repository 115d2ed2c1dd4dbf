"""Utilities that import no other part of mmeffformer."""


def register_all_modules() -> None:
    """Do nothing: importing mmeffformer registers its modules.

    ``mmengine.hub.get_model`` calls this function of every package.
    """
