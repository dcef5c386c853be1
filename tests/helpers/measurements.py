"""What may happen to a measurement; apart from the tests, so that another process imports nothing else."""

import os
import time


def succeed(value: int) -> dict:
    return {"value": value, "pid": os.getpid()}


def fail() -> dict:
    raise ValueError("too large\nand more")


def die() -> dict:
    os._exit(7)


def hang() -> dict:
    time.sleep(60)
    return {}


def spoilt() -> None:
    """The device is of no more use."""
    raise RuntimeError("illegal memory access")
