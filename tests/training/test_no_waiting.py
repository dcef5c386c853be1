"""A training step gives the device its work and reads nothing back: shown on a device without values."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.captioned import save_captioned_images
from helpers.companions import save_tiny_kl, save_tiny_text_encoder
from helpers.networks import TINY
from helpers.paths import GOLDENS, ROOT
from helpers.pretended_gpu import pretended_gpu
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException

from tim.config import load_config
from tim.data.features import RECORD, write_features
from tim.data.latents import write_latent
from tim.digests import cached_sha256
from tim.training import loop, setup
from tim.training.bad_samples import BadSamples
from tim.training.guards import NonFiniteGuard
from tim.training.preemption import Preemption
from tim.training.tasks import CaptionTask, ClassTask

STEPS = 2  # in the second the numbers of the first are read
RADIO = GOLDENS / "radio_tiny/radio_tiny_half.pth.tar"
SMALL = [
    "model.network.params.hidden_size=24", "model.network.params.depth=1", "model.network.params.z_dim=192",
    "data.dataloader={num_workers: 0, batch_size: 4}", "training.sample_steps=null", "training.log_steps=100",
    "training.mixed_precision=no", "training.max_grad_norm_spike=10",
]  # fmt: skip
GUIDANCE_INPUT = ["model.transition_loss.guidance_max=4.0", "model.network.params.guidance_input=true"]
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument", "ignore:.*torch.jit.script")


class Enough(Exception):
    """Ends the loop."""


def steps_that_never_wait(config, folder, task):
    """Take two steps of the loop on a pretended GPU, where whatever waits is an error; returns the run and the GPU."""
    seen = []

    def end_of_step(waited, images):
        seen.append(images)
        if len(seen) == STEPS:
            raise Enough

    with pretended_gpu() as gpu:
        run = setup.build_run(config, folder, 1, task)
        guard = NonFiniteGuard(run.accelerator.device, folder, 0, spike=config.training.max_grad_norm_spike)
        checkpoints = SimpleNamespace(guard=guard, bad_samples=BadSamples(folder, 0), preemption=Preemption(None, None))
        if task is CaptionTask:  # a text encoder reads its masks, unless they are fake
            encode = run.task.encoder
            run.task.encoder = lambda captions: encode(captions) if gpu.beside else pytest.fail("the loop encodes captions")
        gpu.strict = True
        with pytest.raises(Enough):
            loop.run_steps(run, checkpoints, SimpleNamespace(step=end_of_step), 0, 0)
        assert all(p.device.type == "cuda" for p in run.network.parameters()) and gpu.copies > 0
    return run


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Three classes as images, latents and features, and an autoencoder."""
    root = tmp_path_factory.mktemp("classes")
    save_tiny_kl(root / "vae")
    for k in range(12):
        for kind in ("images", "latents", "features"):
            (root / kind / f"c{k % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (20 * k, 0, 0)).save(root / f"images/c{k % 3}/{k}.png")
        write_latent(root / f"latents/c{k % 3}/{k}.safetensors", torch.randn(2, 4, 8, 8), k % 3)
        write_features(root / f"features/c{k % 3}/{k}.safetensors", torch.randn(2, 16, 192))
    record = {"encoder_sha256": cached_sha256(RADIO), "tokens": 16, "width": 192, "antialias": False}
    (root / "features" / RECORD).write_text(json.dumps(record))
    return root


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A text-to-image config: pixels and captions of three sizes."""
    root = tmp_path_factory.mktemp("captions")
    save_captioned_images(root, count=12)
    save_tiny_text_encoder(root / "text")
    tree = yaml.safe_load((ROOT / "configs/t2i/tim_xl_p1_t2i.yaml").read_text())
    tree["model"].update(vae_dir=None, enc_dir=str(RADIO), text_encoder_dir=str(root / "text"), proportion_empty_prompts=0.3)
    small = {"input_size": 16, "patch_size": 4, "in_channels": 3, "cap_feat_dim": 20, "rope_grid": "row_major"}
    tree["model"]["network"]["params"] = {**TINY, **small}
    files = {"root_dir": "images", "jsonl_dir": "data_info.jsonl", "packed_json": "bucket_sampler.json"}
    tree["data"]["dataset"] = {key: str(root / name) for key, name in files.items()}
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


def class_config(classes, data, *options):
    own = ["model.network.params.in_channels=4", f"model.enc_dir={RADIO}"]
    config = load_config(ROOT / "configs/c2i/digits.yaml", [*SMALL, *data, *own, *options])
    del config.training.optimizer.params["fused"]  # as in the published files
    return config


def of_latents(classes):
    dataset = f"{{latent_dir: {classes}/latents, features_dir: {classes}/features}}"
    return ["data.data_type=latent", f"data.dataset={dataset}"]


def test_images_encoded_on_the_fly_with_guidance(classes, tmp_path):
    """Autoencoder, its posterior, RADIO, moving average and dde."""
    data = ["data.data_type=image", f"data.dataset={{image_dir: {classes}/images, image_size: 64}}"]
    guided = ["model.transport.params.enhance_target=true", "model.transport.params.w_cond=0.75"]
    steps_that_never_wait(class_config(classes, data, f"model.vae_dir={classes}/vae", *guided), tmp_path, ClassTask)


@pytest.mark.parametrize("kind,options", [("jvp", GUIDANCE_INPUT), ("two_point", [])])
def test_stored_latents_and_features(classes, tmp_path, kind, options):
    """Two micro-batches a step; an optimiser whose configuration does not say so is fused."""
    own = [f"model.transition_loss.derivative_type={kind}", "model.transition_loss.tangent=marginal", *options]
    config = class_config(classes, of_latents(classes), *own, "training.gradient_accumulation_steps=2")
    run = steps_that_never_wait(config, tmp_path, ClassTask)
    assert run.optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize("kind,cache", [("jvp", "null"), ("dde", "memory")])
def test_captions(captions, tmp_path, kind, cache):
    """Encoded beside the step, where alone a cache waits for what it does not hold yet."""
    options = [f"model.transition_loss.derivative_type={kind}", f"model.text_cache={cache}"]
    config = load_config(captions, [*SMALL, *options])
    steps_that_never_wait(config, tmp_path, CaptionTask)


def test_what_waits_is_seen(classes, tmp_path):
    """An optimiser that is not fused has to be told by the host whether to step."""
    config = class_config(classes, of_latents(classes))
    config.training.optimizer.params["fused"] = False
    with pytest.raises(DataDependentOutputException):
        steps_that_never_wait(config, tmp_path, ClassTask)
