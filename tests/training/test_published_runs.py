"""The six training runs of the published code: its YAML files and command lines, on stand-in data and with small networks."""

import shlex

import pytest
import torch
import yaml
from helpers.captioned import save_captioned_images
from helpers.commands import command
from helpers.companions import save_tiny_dc, save_tiny_kl, save_tiny_text_encoder
from helpers.paths import GOLDENS, ROOT
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from tim.typed_yaml import read_tree

LAUNCH = "torchrun --nnodes {} --nproc_per_node {} --rdzv_id 7 --rdzv_backend c10d --rdzv_endpoint node0:60563"
C2I = "projects/train/trainer_c2i.py --config configs/c2i/{0}.yaml --project_dir workdir/c2i/{0} --seed 0"
T2I = "projects/train/trainer_t2i.py --config configs/t2i/tim_xl_p1_t2i.yaml --project_dir workdir/t2i/tim_t2i --seed 0"
RUNS = {
    "tim_b_p4": (1, 4, C2I),
    "tim_xl_p2_256": (1, 8, C2I),
    "tim_xl_p2_256_mg": (1, 8, C2I),
    "tim_xl_p1_512": (1, 8, C2I),
    "tim_xl_p1_512_mg": (1, 8, C2I),
    "tim_xl_p1_t2i": (2, 8, T2I),
}
# What the published files have beside the keys of ours.
PUBLISHED = {
    "tracker": "tensorboard",
    "tracker_kwargs": {"wandb": {"entity": "us", "group": "tim"}},
    "validation_steps": 500,
    "proportion_empty_prompts": 0.1,
}
SMALL = {
    "depth": 1,
    "hidden_size": 48,
    "num_heads": 3,
    "encoder_depth": 1,
    "lora_hidden_size": 16,
    "projector_dim": 16,
    "z_dim": 192,
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A class of one image in every form, captioned images, and small companions."""
    root = tmp_path_factory.mktemp("stand-in")
    save_tiny_kl(root / "kl")
    save_tiny_dc(root / "dc")
    save_tiny_text_encoder(root / "text", width=1152)
    save_captioned_images(root / "t2i", count=6)
    for kind in ("images", "256", "512"):
        (root / kind / "n01440764").mkdir(parents=True)
    Image.new("RGB", (300, 280)).save(root / "images/n01440764/a.JPEG")
    for kind, shape in (("256", (2, 4, 32, 32)), ("512", (2, 32, 16, 16))):
        save_file({"latent": torch.randn(shape), "label": torch.tensor(0)}, root / kind / "n01440764/a.safetensors")
    return root


def paths(name, root):
    """The keys of a run that name files, on the stand-in data."""
    model = {"enc_dir": str(GOLDENS / "radio_tiny/radio_tiny_half.pth.tar"), "vae_dir": str(root / "dc")}
    if "t2i" in name:
        files = {"root_dir": "/images", "jsonl_dir": "/data_info.jsonl", "packed_json": "/bucket_sampler.json"}
        dataset = {key: f"{root}/t2i{file}" for key, file in files.items()}
        return model | {"text_encoder_dir": str(root / "text")}, dataset
    if "512" not in name:
        model["vae_dir"] = str(root / "kl")
    return model, {"latent_dir": str(root / ("512" if "512" in name else "256")), "image_dir": str(root / "images")}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_a_published_run_starts(name, stand_in, tmp_path):
    """Everything is read, built and checked; nothing is written."""
    nodes, gpus, words = RUNS[name]
    launch = get_args_parser().parse_args(shlex.split(f"{LAUNCH.format(nodes, gpus)} {words.format(name)}")[1:])
    trainer, config = launch.training_script, launch.training_script_args[1]
    assert (ROOT / trainer).is_file() and launch.rdzv_endpoint == "node0:60563"

    tree = read_tree(ROOT / config)
    model, dataset = paths(name, stand_in)
    tree["model"] |= model
    tree["data"]["dataset"] |= dataset
    tree["training"] |= PUBLISHED
    tree["model"]["network"]["params"] |= SMALL | ({"in_channels": 8} if "t2i" in name else {})
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(tree))
    project = tmp_path / launch.training_script_args[3]
    rest = launch.training_script_args[4:]
    done = command(trainer, "--config", tmp_path / "published.yaml", "--project_dir", project, *rest, "--dry-run")
    assert f"steps: {tree['training']['max_train_steps']}" in done.stdout and not project.exists()
