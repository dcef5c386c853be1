"""sample_c2i_ddp.py as users run it: layout, determinism, resume, several processes, refusals."""

import json

import numpy as np
import pytest
import torch
from helpers.commands import command, start_and_kill
from helpers.companions import save_tiny_kl
from helpers.networks import randomize
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from tim import rng
from tim.checkpoint.weights import find_weights
from tim.config import load_config
from tim.evaluation.samples import sampled_images
from tim.files import run_record
from tim.images import to_uint8
from tim.models.c2i.tim_model import TiM
from tim.schedulers.sampling import sample
from tim.schedulers.transports import OT_FM

SAMPLER = "projects/sample/sample_c2i_ddp.py"
CONFIG = "configs/c2i/digits.yaml"
SMALL_NETWORK = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "depth": 1, "num_heads": 2,
    "encoder_depth": 1, "z_dim": 8, "projector_dim": 8, "lora_hidden_size": 8, "qk_norm": True, "new_condition": "t-r",
    "use_new_embed": True, "distance_aware": True, "rope_grid": "row_major",
}  # fmt: skip
FOLDER = "weights-8x8-T0.0-1.0-Step-4-sto-0.0-transition-cfg-1.0-0.0-1.0"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the digits network, as a released checkpoint would come."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    network = randomize(load_config(ROOT / CONFIG).model.network.build(), scale=0.2)
    save_file(network.state_dict(), path)
    return path


def draw(weights, out, *flags, processes=1, check=True, config=CONFIG):
    return command(
        SAMPLER, "--config", config, "--ckpt", weights, "--sample-dir", out, "--num-fid-samples", 30,
        "--per-proc-batch-size", 8, "--num-steps", 4, *flags, processes=processes, check=check,
    )  # fmt: skip


def pngs(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.png"))}


def pixels(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))])


def test_layout_record_and_npz(weights, tmp_path):
    done = draw(weights, tmp_path, "--npz", "--save-latent", "--cfg-scale", 2.5)
    name = FOLDER.replace("cfg-1.0", "cfg-2.5")
    shown = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert shown == {name, *(f"{name}.{end}" for end in ("run.json", "latents", "png", "npz"))}
    images = [f"{k:06d}.png" for k in range(30)]
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == images, "scorers take every file of the folder"
    assert [path.name for path in sampled_images(tmp_path)] == images, "what evaluations take of all that was written"
    record = json.loads(run_record(tmp_path / name).read_text())
    assert record["complete"] and record["nfe"] == 7 and "NFE 7" in done.stdout
    assert record["settings"]["global_seed"] == 0 and len(record["settings"]["weights_sha256"]) == 64
    assert {"tim", "torch", "python"} <= record["versions"].keys() and record["speed"]["images_per_second"] > 0
    assert done.stdout.splitlines()[-1].startswith(f"next: python projects/evaluate/evaluate_folder.py REAL {tmp_path / name} ")
    packed = np.load(tmp_path / f"{name}.npz")["arr_0"]
    assert packed.dtype == np.uint8 and (packed == pixels(tmp_path / name)).all()
    latent = load_file(tmp_path / f"{name}.latents" / "000007.safetensors")["latent"]
    want = (127.5 * latent + 127.5).round().clamp(0, 255)
    assert (packed[7, :, :, 0] == want[0].numpy()).all()


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_write_the_same_files_as_one(weights, tmp_path):
    flags = ["--stochasticity-ratio", 0.5, "--cfg-scale", 2.0, "--class-labels", "random"]
    for name, processes in (("one", 1), ("two", 2)):
        draw(weights, tmp_path / name, *flags, processes=processes)
    a, b = (pngs(next(p for p in (tmp_path / n).iterdir() if p.is_dir())) for n in ("one", "two"))
    assert len(a) == 30 and a == b


def test_images_depend_on_seed_and_index_alone(weights, tmp_path):
    draw(weights, tmp_path / "a")
    draw(weights, tmp_path / "b", "--per-proc-batch-size", 5, "--num-fid-samples", 17)
    draw(weights, tmp_path / "c", "--global-seed", 1)
    a, b, c = (pixels(tmp_path / n / FOLDER) for n in "abc")
    assert np.abs(a[:17] - b).max() <= 1 and (a[:17] != b).mean() < 1e-3, "another batch size: rounding at most"
    assert np.abs(a - c).mean() > 5


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_files(weights, tmp_path):
    flags = ["--num-steps", "40", "--num-fid-samples", "160"]
    name = FOLDER.replace("Step-4", "Step-40")
    draw(weights, tmp_path / "whole", *flags)
    killed = tmp_path / "killed" / name
    words = [SAMPLER, "--config", CONFIG, "--ckpt", weights, "--sample-dir", tmp_path / "killed", "--per-proc-batch-size", 8]
    start_and_kill([*words, *flags], lambda: len(list(killed.glob("0*.png"))) >= 20)
    kept = pngs(killed)
    assert 20 <= len(kept) < 160 and not json.loads(run_record(killed).read_text())["complete"]
    draw(weights, tmp_path / "killed", *flags)
    assert pngs(killed) == pngs(tmp_path / "whole" / name)


def test_repeating_a_finished_command_draws_nothing(weights, tmp_path):
    draw(weights, tmp_path)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / FOLDER).glob("*.png")}
    assert "0 drawn now" in draw(weights, tmp_path).stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / FOLDER).glob("*.png")} == times
    missing = tmp_path / FOLDER / "000013.png"
    content = missing.read_bytes()
    missing.unlink()
    draw(weights, tmp_path)
    assert missing.read_bytes() == content


@pytest.mark.parametrize("kind", ["OT_FM", "TrigFlow", "EDM", "VP_SDE", "VE_SDE"])
@pytest.mark.parametrize("sample_type", ["transition", "diffusion"])
def test_every_transport_samples(weights, tmp_path, kind, sample_type):
    from tim.generation.sampler import load_sampler
    from tim.generation.settings import SampleSettings

    config = load_config(ROOT / CONFIG)
    config.model.transport.target, config.model.transport.params = f"tim.schedulers.transports.{kind}", {}
    settings = SampleSettings(num_steps=5, sample_type=sample_type, stochasticity_ratio=0.2, cfg_scale=1.5)
    sampler = load_sampler(config, find_weights(weights), settings, torch.device("cpu"))
    images, latents = sampler.draw(range(4))
    assert images.shape == (4, 8, 8, 3) and torch.isfinite(latents).all() and images.std() > 0
    transport = config.model.transport.build()
    assert (sampler.settings.T_max, sampler.settings.T_min) == (transport.T_max, transport.T_min)


def test_through_an_autoencoder_at_another_size(tmp_path):
    save_tiny_kl(tmp_path / "vae", scaling_factor=0.2)
    config = load_config(
        ROOT / "configs/c2i/tim_b_p4.yaml",
        [f"model.vae_dir={tmp_path}/vae", *(f"model.network.params.{k}" for k in (
            "depth=1", "hidden_size=48", "num_heads=3", "encoder_depth=1", "num_classes=12", "z_dim=8"))],
    )  # fmt: skip
    from tim.config import to_yaml

    (tmp_path / "c.yaml").write_text(to_yaml(config))
    network = randomize(config.model.network.build())
    torch.save({"ema": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "released.bin")
    flags = ["--height", 128, "--width", 64, "--num-fid-samples", 3, "--slice_vae"]
    draw(tmp_path / "released.bin", tmp_path / "out", *flags, config=tmp_path / "c.yaml")
    folder = tmp_path / "out" / "released-128x64-T0.0-1.0-Step-4-sto-0.0-transition-cfg-1.0-0.0-1.0"
    assert pixels(folder).shape == (3, 128, 64, 3)
    wrong = draw(tmp_path / "released.bin", tmp_path / "out", "--height", 100, config=tmp_path / "c.yaml", check=False)
    assert wrong.returncode == 2 and "--height 100 is not a multiple of 32" in wrong.stderr


def test_class_labels():
    from tim.generation.prompt_sets import ClassLabels

    def labels(kind, classes, images, seed=0):
        chosen = ClassLabels(kind, classes, 10, seed, 1000)
        return [chosen.prompts[k] for k in images]

    assert labels("cycle", 4, range(6)) == [0, 1, 2, 3, 0, 1]
    assert labels("7,2", None, [0, 1, 5]) == [7, 2, 2]
    drawn = labels("random", None, range(200), seed=3)
    assert drawn[20:30] == labels("random", None, range(20, 30), seed=3)
    assert set(drawn) == set(range(10))
    for kind, classes, match in (("7,10", None, "label 10"), ("seven", None, "'seven'"), ("cycle", 11, "11")):
        with pytest.raises(ValueError, match=match):
            labels(kind, classes, [])


def test_labels_as_conditions():
    """Any labels of the network, without a run; the null class where guidance needs it and the network knows it."""
    from tim.generation.conditions import ClassConditions

    conditions = ClassConditions(10, True, torch.device("cpu"))
    cond, uncond = conditions([3, 9, 3], guided=True)
    assert cond["y"].tolist() == [3, 9, 3] and uncond["y"].tolist() == [10] * 3
    assert conditions([3], guided=False)[1] is None
    for wrong in (10, -1, "a red fox"):
        with pytest.raises(ValueError, match=r"is no class; the network has 0 to 9"):
            conditions([wrong], guided=False)
    assert ClassConditions(10, False, torch.device("cpu"))([0], guided=True)[1] is None


@pytest.mark.parametrize(
    "flags,match",
    [
        (["--num-steps", "0"], "--num-steps must be >= 1, got 0"),
        (["--cfg-scale", "0.5"], "--cfg-scale must be >= 1, got 0.5"),
        (["--T-min", "1.0"], "--T-min must be below --T-max"),
        (["--class-labels", "3,12"], "label 12 is out of range, the network has 0 to 9"),
        (["--height", "9"], "--height 9 is not a multiple of 2"),
        (["--ckpt", "absent"], "--ckpt absent"),
        (["--guidance-low", "0.7", "--guidance-high", "0.2"], "--guidance-low"),
        (["--global-seed", "-1"], "--global-seed must be >= 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(weights, tmp_path, flags, match):
    done = draw(weights, tmp_path / "out", *flags, check=False)
    assert done.returncode == 2 and match in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_written_over(weights, tmp_path):
    draw(weights, tmp_path)
    before = pngs(tmp_path / FOLDER)
    done = draw(weights, tmp_path, "--global-seed", 3, check=False)
    assert done.returncode == 2 and "global_seed: 0 there, 3 now" in done.stderr
    assert pngs(tmp_path / FOLDER) == before


def test_weights_of_another_network_are_reported(weights, tmp_path):
    state = load_file(weights)
    state["blocks.0.attn.proj.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "w.safetensors")
    done = draw(tmp_path / "w.safetensors", tmp_path / "out", check=False)
    assert done.returncode == 2 and "blocks.0.attn.proj.bias: file (7,), network (96,)" in done.stderr


def test_one_step_with_guidance_warns_that_it_is_unguided(weights, tmp_path):
    with pytest.warns(UserWarning, match="has no effect"):
        done = draw(weights, tmp_path, "--num-steps", 1, "--cfg-scale", 3)
    assert "NFE 1 " in done.stdout
    assert "NFE 2 " in draw(weights, tmp_path / "closed", "--num-steps", 1, "--cfg-scale", 3, "--guide-first-step").stdout


def test_guidance_as_an_input_costs_one_evaluation_a_step_and_fits_its_network_alone(weights, tmp_path):
    """The images are those of the network asked directly; without the input or beside --cfg-scale it is refused."""
    network = randomize(TiM(**SMALL_NETWORK, guidance_input=True), scale=0.2)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    config = tmp_path / "own.yaml"
    params = ", ".join(f"{key}: {json.dumps(value)}" for key, value in {**SMALL_NETWORK, "guidance_input": True}.items())
    objective = "transition_loss: {guidance_max: 2.0}"
    config.write_text(f"base: {ROOT / CONFIG}\nmodel: {{{objective}, network: {{params: {{{params}}}}}}}\n")
    flags = ("--guidance-input", 3, "--guidance-high", 0.5, "--num-fid-samples", 4)
    with pytest.warns(UserWarning, match=r"--guidance-input 3\.0 goes beyond guidance_max=2\.0 of training"):
        done = draw(tmp_path / "own.safetensors", tmp_path, *flags, config=config)
    assert "NFE 4" in done.stdout
    (folder,) = [path for path in tmp_path.iterdir() if path.name.endswith("cfg-1.0-0.0-0.5-input-3.0")]
    guidance = torch.tensor([[3.0, 0.0, 0.5]]).expand(4, 3)
    noise = torch.from_numpy(
        np.stack([rng.generator(0, "sample", 0, k).standard_normal((1, 8, 8), dtype=np.float32) for k in range(4)])
    )
    kwargs = {"y": torch.arange(4), "guidance": guidance}
    want = to_uint8(sample(OT_FM(P_mean=-0.4), network.eval(), noise, kwargs, num_steps=4).x.float())
    assert np.array_equal(pixels(folder), want)
    for own, words, match in (
        (tmp_path / "own.safetensors", [*flags, "--cfg-scale", 2], "replaces --cfg-scale 2.0"),
        (weights, flags, "--guidance-input 3.0 needs a network that was trained with guidance_input"),
    ):
        refused = draw(own, tmp_path / "no", *words, check=False, config=config if own != weights else CONFIG)
        assert refused.returncode == 2 and match in refused.stderr and not (tmp_path / "no").exists()
