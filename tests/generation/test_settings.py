"""The settings of sampling and their flags."""

import pytest
from helpers.paths import ROOT

from tim.cli import command_parser
from tim.generation import prompt_sets
from tim.generation.settings import SampleSettings, add_sample_arguments, settings_from

NEEDED = ["--config", "c.yaml", "--ckpt", "w.safetensors"]


@pytest.fixture
def parser():
    parser = command_parser("Draw.")
    add_sample_arguments(parser)
    return parser


def test_flags_and_settings_have_the_same_defaults(parser):
    assert repr(settings_from(parser.parse_args(NEEDED))) == repr(SampleSettings())  # types too: 1.0 is not 1


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--slice_vae", "--save-latent", "--no-tf32"], {"slice_vae": True, "save_latent": True, "tf32": False}),
        (["--slice-vae", "--no-slice_vae", "--no-save-latent", "--tf32"], {}),
        (["--T-max", "0.9", "--height", "64", "--cfg-scale", "2"], {"T_max": 0.9, "height": 64, "cfg_scale": 2.0}),
    ],
)
def test_published_command_lines_are_understood(parser, words, changes):
    assert settings_from(parser.parse_args([*NEEDED, *words])) == SampleSettings(**changes)


def test_every_flag_says_what_it_does_and_its_default(parser):
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, action.option_strings
        has_default = action.dest not in ("help", "allow_code") and not action.required
        assert not has_default or "default:" in parser._get_formatter()._expand_help(action)
    for group in ("model:", "images:", "transitions:", "guidance:"):
        assert group in text


def test_the_evaluation_that_comes_next_is_there():
    kinds = [prompt_sets.ClassLabels("cycle", None, 1000, 0, 1), *vars(prompt_sets).values()]
    commands = {kind.evaluation for kind in kinds if hasattr(kind, "evaluation")}
    assert len(commands) == 5 and all((ROOT / words.split()[0]).is_file() for words in commands)
