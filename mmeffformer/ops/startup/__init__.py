"""The folder that ``python -m mmeffformer run`` puts at the front of ``PYTHONPATH``."""
