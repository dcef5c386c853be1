"""Training runs without a training."""

import torch
import yaml

from helpers.checkpoints import save_checkpoint
from helpers.networks import randomize
from helpers.paths import ROOT


def save_tiny_run(folder, config, network, params, scale=0.05, **model):
    """A run's config.yaml, after one of configs/, and a checkpoint of random weights; returns the folder."""
    tree = yaml.safe_load((ROOT / "configs" / config).read_text())
    tree["model"].update(model)
    tree["model"]["network"]["params"] = params
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    torch.manual_seed(0)
    network = randomize(network(**params), scale=scale)
    save_checkpoint(folder / "checkpoints", 1, network, None, torch.optim.SGD(network.parameters()), {"step": 1})
    return folder
