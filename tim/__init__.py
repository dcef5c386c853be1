"""Transition Models: one diffusion transformer that jumps between any two times."""

__version__ = "0.1.0"
