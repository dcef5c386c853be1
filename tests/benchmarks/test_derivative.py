"""How exact the derivatives are in half precision."""

import torch
from helpers.paths import ROOT

from tim.benchmarks.derivative import DerivativePrecision
from tim.config import load_config


def test_half_precision_ruins_differences_and_not_the_exact_derivative():
    precision = DerivativePrecision(load_config(ROOT / "configs/c2i/digits.yaml"), torch.device("cpu"), 8)
    assert precision.error("jvp", "bfloat16") < 0.1 < precision.error("dde", "bfloat16")
    assert precision.two_point_error(0.005, "float32") < 0.01 < 1 < precision.two_point_error(0.005, "bfloat16")
