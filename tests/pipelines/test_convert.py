"""Weights and runs to pipelines and back: the same tensors and pixels, and nothing written of what does not fit."""

import shutil

import numpy as np
import torch
import yaml
from helpers.commands import command
from helpers.companions import save_tiny_text_encoder
from helpers.networks import relative_error
from helpers.paths import GOLDENS, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from tim import rng
from tim.pipelines import TiMClassPipeline, TiMPipeline

TOOL = "tools/convert_to_diffusers.py"


def config_of(folder, kind, params, **model):
    """config.yaml of a network of pixels or latents."""
    name = {"t2i": "t2i/openmoji.yaml", "c2i": "c2i/digits.yaml"}[kind]
    tree = yaml.safe_load((ROOT / "configs" / name).read_text())
    tree["model"].update(model)
    tree["model"]["network"]["params"] = params
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


@torch.no_grad()
def test_goldens_hold_in_a_converted_folder_and_come_back(golden, tmp_path):
    meta, d, _ = golden
    width = meta["network"].get("cap_feat_dim", 20)
    save_tiny_text_encoder(tmp_path / "text", width)
    text = {"text_encoder_dir": str(tmp_path / "text")} if meta["kind"] == "t2i" else {}
    config = config_of(tmp_path, meta["kind"], meta["network"], **text)
    weights = GOLDENS / f"{meta['kind']}_tiny" / "weights.safetensors"
    command(TOOL, weights, tmp_path / "pipe", "--config", config)
    cls = TiMPipeline if meta["kind"] == "t2i" else TiMClassPipeline
    network = cls.from_pretrained(tmp_path / "pipe").transformer
    assert relative_error(network(d["x"], d["t"], d["r"], d["y"]), d["out"]) < 1e-5
    command(TOOL, tmp_path / "pipe", tmp_path / "back.safetensors")
    before, after = load_file(weights), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_half_precision_pickle_without_projector_comes_back(class_run, tmp_path):
    """As released weights may be: dtypes and missing layers are those of the file, be it wrapped, and the card is there."""
    state = {k: v.bfloat16() for k, v in load_file(class_run / "w.safetensors").items() if not k.startswith("projector.")}
    torch.save({"ema": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.bin")
    done = command(TOOL, tmp_path / "w.bin", tmp_path / "pipe", "--config", class_run / "config.yaml")
    assert "TiMClassPipeline.from_pretrained(" in done.stdout and not list(tmp_path.glob(".*"))
    assert {p.name for p in (tmp_path / "pipe").iterdir()} == {"README.md", "model_index.json", "scheduler", "transformer"}
    command(TOOL, tmp_path / "pipe", tmp_path / "back.safetensors")
    after = load_file(tmp_path / "back.safetensors")
    assert state.keys() == after.keys()
    assert all(v.dtype == after[k].dtype and torch.equal(v, after[k]) for k, v in state.items())


def noise_of(shape):
    """The sampler's noise of image 0 under seed 0."""
    return torch.from_numpy(rng.generator(0, "sample", 0, 0).standard_normal(shape, dtype=np.float32))[None]


def test_captions_of_a_converted_run_are_the_samplers_pixels(text_run, tmp_path):
    """Network, DC autoencoder, text encoder, tokenizer and scheduler come out of the config beside the weights."""
    command(TOOL, text_run / "w.safetensors", tmp_path / "pipe")
    pipe = TiMPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float32).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    words = ["--config", text_run / "config.yaml", "--ckpt", text_run / "w.safetensors", "--sample-dir", tmp_path]
    command("projects/sample/sample_t2i.py", *words, "--prompts", "a red circle", "--cfg-scale", "2.5", "--name", "sampler")
    image = pipe("a red circle", num_inference_steps=4, guidance_scale=2.5, latents=noise_of((8, 4, 4))).images[0]
    (path,) = (tmp_path / "sampler").glob("*.png")
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_a_training_run_ends_with_its_pipeline(tmp_path):
    """Of the moving average, with the names of the classes; once more, when the run is over, in the place of the old one."""
    words = ["projects/train/trainer_c2i.py", "--config", "configs/c2i/digits.yaml", "--project_dir", tmp_path / "run"]
    words += ["training.max_train_steps=1", "training.sample_steps=null", "model.network.params.depth=1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    done = command(*words, f"training.export_pipeline={tmp_path / 'mine'}", check=False)
    assert done.returncode == 2 and "mine exists and is no pipeline" in done.stderr and not (tmp_path / "run").exists()
    done = command(*words, "training.export_pipeline=true")
    folder = tmp_path / "run/pipeline"
    assert f"pipeline of diffusers in {folder}" in done.stdout
    shutil.rmtree(folder / "transformer")
    command(*words, "training.export_pipeline=true")
    pipe = TiMClassPipeline.from_pretrained(folder)
    ema = load_file(tmp_path / "run/checkpoints/step-0000001/ema.safetensors")
    assert all(torch.equal(v, ema[k]) for k, v in pipe.transformer.state_dict().items() if k in ema)
    assert pipe.labels == {str(k): k for k in range(10)}
    words = ["--config", tmp_path / "run/config.yaml", "--ckpt", tmp_path / "run", "--sample-dir", tmp_path, "--name", "x"]
    command("projects/sample/sample_c2i_ddp.py", *words, "--class-labels", "7", "--num-fid-samples", "1", "--num-steps", "2")
    image = pipe("7", num_inference_steps=2, latents=noise_of((1, 8, 8))).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "x/000000.png")))


def test_what_does_not_fit_is_named_and_leaves_nothing(text_run, class_run, tmp_path):
    command(TOOL, class_run / "w.safetensors", tmp_path / "pipe")
    for part in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copytree(tmp_path / "pipe", tmp_path / f"no-{part}")
        (tmp_path / f"no-{part}/transformer/{part}").unlink()
    shutil.copytree(tmp_path / "pipe", tmp_path / "other")
    save_file({"x": torch.zeros(1)}, tmp_path / "other/transformer/diffusion_pytorch_model.safetensors", {"format": "pt"})
    shutil.copy(class_run / "w.safetensors", tmp_path / "alone.safetensors")
    gone = yaml.safe_load((text_run / "config.yaml").read_text())
    for key in ("vae_dir", "text_encoder_dir"):
        tree = {**gone, "model": {**gone["model"], key: str(tmp_path / "gone")}}
        (tmp_path / f"{key}.yaml").write_text(yaml.safe_dump(tree))
    before = sorted(tmp_path.iterdir())
    out, weights = tmp_path / "out", text_run / "w.safetensors"
    for words, match in (
        ([tmp_path / "nowhere", out], "nowhere is neither a weights file nor a folder with a checkpoint"),
        ([tmp_path / "alone.safetensors", out], "--config is missing: name the YAML file that"),
        ([weights, out, "--config", class_run / "config.yaml"], "belongs to another network than the config's"),
        ([weights, out, "--config", tmp_path / "vae_dir.yaml"], "model.vae_dir="),
        ([weights, out, "--config", tmp_path / "text_encoder_dir.yaml"], "model.text_encoder_dir="),
        ([weights, out, "--lora"], "has no adapters: its config has no model.lora"),
        ([weights, tmp_path / "pipe"], "pipe exists; choose another folder or remove it"),
        ([text_run, tmp_path / "out.safetensors"], "is no pipeline of TiM: there is no"),
        ([tmp_path / "no-config.json", tmp_path / "out.safetensors"], "transformer/config.json"),
        ([tmp_path / "no-diffusion_pytorch_model.safetensors", tmp_path / "out.safetensors"], "diffusion_pytorch_model"),
        ([tmp_path / "other", tmp_path / "out.safetensors"], "belongs to another network than the config's"),
        ([tmp_path / "pipe", tmp_path / "alone.safetensors"], "alone.safetensors exists"),
        ([tmp_path / "pipe", tmp_path / "out.safetensors", "--lora"], "no meaning on the way back"),
    ):
        done = command(TOOL, *words, check=False)
        assert done.returncode == 2 and done.stderr.count("error: ") == 1 and match in done.stderr, (words, done.stderr)
        assert sorted(tmp_path.iterdir()) == before
