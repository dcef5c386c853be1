"""Transition Models: one diffusion transformer that jumps between any two times."""

from tim import compat

__version__ = "0.1.0"

compat.install()
