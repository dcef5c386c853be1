"""Which classes a configuration may name, and of what kind they must be."""

import importlib
import sys

import pytest
from helpers.paths import ROOT

from tim import targets
from tim.cli import command_parser
from tim.config import ConfigError, Target, load_config
from tim.generation.commands import sample_c2i
from tim.training.command import train_c2i

DIGITS = ROOT / "configs/c2i/digits.yaml"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module of one's own, in which the user stands; what is allowed is forgotten afterwards."""
    (tmp_path / "own_code.py").write_text("import torch\nclass Net(torch.nn.Module): ...\nclass Adam(torch.optim.Adam): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "_allowed", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("own_code", None)


@pytest.mark.parametrize(
    "key,target,match",
    [
        ("model.network", "os.system", r"'os\.system' is neither .* --allow-code os "),
        ("model.network", "own_code.Net", r"--allow-code own_code \(or TIM_ALLOW_CODE=own_code\)"),
        ("model.network", "torch.nn.Linear", "--allow-code torch.nn "),
        ("model.network", "timm.create_model", "--allow-code timm "),
        ("model.network", "tim.typed_yaml.os.system", "cannot be imported"),
        ("model.network", "tim.typed_yaml.Path", "is a class of pathlib"),
        ("model.network", "tim.rng.normals", "is no class"),
        ("model.network", "tim.schedulers.transports.OT_FM", "is no torch.nn.Module"),
        ("model.network", "torch.optim.AdamW", "is no torch.nn.Module"),
        ("model.network", "TiM", "is no import path"),
        ("model.transport", "tim.models.c2i.tim_model.TiM", "is no tim.schedulers.transports.Transport"),
        ("model.transition_loss", "tim.schedulers.transports.OT_FM", "has no method evaluate"),
        ("training.optimizer", "torch.optim.lr_scheduler.StepLR", "is no torch.optim.Optimizer"),
        ("training.optimizer", "torch.optim.LBFGS", "needs a closure"),
    ],
)
def test_what_may_not_be_named(own, key, target, match):
    before = set(sys.modules)
    section, _, name = key.partition(".")
    (own / "config.yaml").write_text(f"base: {DIGITS}\n{section}: {{{name}: {{target: {target}}}}}\n")
    with pytest.raises(ConfigError, match=rf"{key}\.target=.*{match}"):
        load_config("config.yaml")
    assert "own_code" not in set(sys.modules) - before and str(own) not in sys.path


@pytest.mark.parametrize("words", [["--allow-code", "own_code"], ["--allow-code", "x", "--allow-code", "y.z,own_code"], []])
def test_own_code_is_allowed_by_flag_and_by_environment(own, words, monkeypatch, capsys):
    if not words:
        monkeypatch.setenv(targets.VARIABLE, "x,own_code")
    (own / "config.yaml").write_text(f"base: {DIGITS}\nmodel: {{network: {{target: own_code.Net}}}}\n")
    options = ["training.optimizer.target=own_code.Adam"]
    train_c2i(["--config", "config.yaml", "--project_dir", "run", *words, "--print-config", *options])
    assert "target: own_code.Net" in capsys.readouterr().out
    assert load_config("config.yaml", options).own_modules() == ["own_code"]
    assert load_config(DIGITS).own_modules() == []
    with pytest.raises(ConfigError, match="own_code_of_others"):
        Target("own_code_of_others.Net").resolve()


def test_sampling_a_strangers_project_runs_none_of_its_code(own):
    (own / "config.yaml").write_text(f"base: {DIGITS}\nmodel: {{network: {{target: own_code.Net}}}}\n")
    with pytest.raises(ConfigError, match="--allow-code own_code"):
        sample_c2i(["--config", "config.yaml", "--ckpt", "run"])
    assert "own_code" not in sys.modules


def test_a_file_is_no_module(capsys):
    from tim.cli import add_allow_code

    parser = command_parser("")
    add_allow_code(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--allow-code", "my_code.py"])
    assert "'my_code.py' is no module" in capsys.readouterr().err


@pytest.mark.parametrize(
    "params,match",
    [
        ("betas: [0.9]", r"betas must be a list of 2"),
        ("betas: 0.9", r"betas must be a list of 2"),
        ("betas: [0.9, 0.95, 0.99]", r"betas must be a list of 2"),
        ("betas: [0.9, x]", r"betas\[1\] must be float, got 'x'"),
        ("betas: [0.9, 1.5]", r"training\.optimizer: .*1\.5"),
        ("weight_decay: [1]", r"weight_decay must be float, got \[1\]"),
        ("weight_decay: .nan", r"weight_decay must be a finite number"),
        ("weight_decay: -1", r"training\.optimizer: .*-1"),
        ("eps: small", r"eps must be float, got 'small'"),
        ("fused: perhaps", r"fused must be bool, got 'perhaps'"),
        ("amsgrad: 3", r"amsgrad must be bool, got 3"),
        ("lr: 1", r"unknown key training\.optimizer\.params\.lr"),
    ],
)
def test_parameters_of_optimisers_are_checked_at_once(params, match):
    with pytest.raises(ConfigError, match=match):
        load_config(DIGITS, [f"training.optimizer.params={{{params}}}"])


@pytest.mark.parametrize(
    "override,match",
    [
        ("training.sample_steps=-1", ">= 0, got -1"),
        ("training.checkpoints_total_limit=0", "> 0, got 0"),
        ("training.checkpoint_list=[5, -5]", r"checkpoint_list\[1\] must be > 0, got -5"),
        ("training.lr_warmup_steps=-1", ">= 0, got -1"),
        ("training.learning_rate=.nan", "finite number"),
        ("training.learning_rate=0", "> 0, got 0"),
        ("training.max_grad_norm=.inf", "finite number"),
        ("training.max_grad_norm=1e300", "finite number"),
        ("training.max_grad_norm_spike=1", "> 1, got 1"),
        ("training.max_train_steps=1e3", "must be int, got 1000.0"),
        (f"training.log_steps={10**30}", "that a tensor can hold"),
        ("training.tracker_kwargs={a: [.nan]}", r"training\.tracker_kwargs\.a\[0\] must be a finite number"),
        ("model.proj_coeff=-0.5", ">= 0, got -0.5"),
        ("model.max_seq_length=0", "> 0, got 0"),
        ("model.proportion_empty_prompts=1.5", "<= 1, got 1.5"),
        ("model.ema_decay=.nan", "finite number"),
        ("data.dataloader.num_workers=-1", ">= 0, got -1"),
        ("data.dataset.image_size=0", "> 0, got 0"),
        ("data.max_bad_samples=-1", ">= 0, got -1"),
        ("model.network.params.hidden_size=0", "> 0, got 0"),
        ("model.network.params.depth=1000000", "<= 1000, got 1000000"),
        ("model.network.params.mlp_ratio=.inf", "finite number"),
        ("model.network.params.class_dropout_prob=2", "<= 1, got 2"),
        ("model.transport.params.P_std=-1", "> 0, got -1"),
        ("model.transport.params.sigma_d=.nan", "finite number"),
        ("model.transition_loss.differential_epsilon=0", "differential_epsilon must be > 0"),
    ],
)
def test_settings_that_no_run_can_use_are_named(override, match):
    with pytest.raises(ConfigError, match=match) as error:
        load_config(DIGITS, [override])
    assert override.partition("=")[0].rpartition(".")[2] in str(error.value)


def test_a_folder_cannot_pose_as_a_known_package(own):
    """Where code of one's own is allowed, the current folder is looked into for that code alone."""
    (own / "prodigyopt.py").write_text("import torch\nclass Prodigy(torch.optim.Adam): ...\n")
    targets.allow_code("own_code")
    assert Target("own_code.Net").resolve() and str(own) in sys.path
    with pytest.raises(ConfigError, match=r"'prodigyopt\.Prodigy' cannot be imported: No module named 'prodigyopt'"):
        Target("prodigyopt.Prodigy").resolve()
    assert str(own) in sys.path
