"""Text-to-image sampling as users run it: the three benchmarks and free prompts, determinism, resume, refusals."""

import json

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import command, start_and_kill
from helpers.companions import save_tiny_dc, save_tiny_text_encoder
from helpers.networks import TINY, randomize
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import save_file

from tim.checkpoint.weights import find_weights
from tim.config import load_config
from tim.evaluation.samples import sampled_images
from tim.files import run_record
from tim.generation.prompt_sets import DPGPrompts, read_prompts
from tim.generation.sampler import load_sampler
from tim.generation.settings import SampleSettings
from tim.models.t2i.tim_model import TiM
from tim.models.text_encoders import TextEncoder

PROMPTS = [
    "a photo of a bench",
    "a photo of four clocks",
    "a photo of a green skateboard below two red dogs",
    "a",
    "un café près de la gare 狐 🦊",
    "a photo of a cow, a photo of a cow, a photo of a cow, a photo of a very small cow",
    "two dogs",
]
COMMANDS = {name: f"projects/sample/sample_t2i_{name}_ddp.py" for name in ("geneval", "dpgbench", "mjhq30k")}
SETTING = "w-16x24-T0.0-1.0-Step-3-sto-0.0-transition-cfg-2.5-0.0-1.0"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with config.yaml, weights w.safetensors, a text encoder and a DC autoencoder, all random."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_text_encoder(root / "text")
    save_tiny_dc(root / "vae", scaling_factor=0.5)
    tree = yaml.safe_load((ROOT / "configs/t2i/tim_xl_p1_t2i.yaml").read_text())
    network = {**TINY, "input_size": 4, "patch_size": 1, "in_channels": 8, "cap_feat_dim": 20}
    tree["model"].update(vae_dir=str(root / "vae"), text_encoder_dir=str(root / "text"))
    tree["model"]["network"]["params"] = network
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    save_file(randomize(TiM(**network), scale=0.3).state_dict(), root / "w.safetensors")
    return root


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The prompt sets in the three benchmarks' own formats."""
    root = tmp_path_factory.mktemp("prompts")
    lines = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": p} for p in PROMPTS]
    (root / "geneval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "dpg").mkdir()
    for number, prompt in enumerate(PROMPTS):
        (root / "dpg" / f"prompt_{number}.txt").write_text(prompt + "\n", encoding="utf-8")
    meta = {f"key{k}": {"category": ("animals", "art")[k % 2], "prompt": p} for k, p in enumerate(PROMPTS)}
    (root / "mjhq.json").write_text(json.dumps(meta))
    return {"geneval": root / "geneval.jsonl", "dpgbench": root / "dpg", "mjhq30k": root / "mjhq.json"}


def arguments(models, prompts, name, out, *flags) -> list:
    return [
        COMMANDS[name], "--config", models / "config.yaml", "--ckpt", models / "w.safetensors", "--sample-dir", out,
        "--caption-dir", prompts[name], "--height", 16, "--width", 24, "--num-steps", 3, "--cfg-scale", 2.5,
        "--per-proc-batch-size", 6, *flags,
    ]  # fmt: skip


def files(folder) -> dict[str, bytes]:
    """Content of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


LAYOUTS = {
    "geneval": {f"{i:05d}/{f}" for i in range(7)
                for f in ("metadata.jsonl", "grid.png", *(f"samples/{j:05d}.png" for j in range(4)))},
    "dpgbench": {f"prompt_{k}.png" for k in range(7)},
    "mjhq30k": {f"{('animals', 'art')[k % 2]}/key{k}.png" for k in range(7)},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", list(COMMANDS))
def test_benchmarks_write_their_layout_alike_on_one_and_two_processes(models, prompts, tmp_path, name):
    command(*arguments(models, prompts, name, tmp_path / "one", "--num-classes", 1000))
    command(*arguments(models, prompts, name, tmp_path / "two"), processes=2)
    folder = tmp_path / "one" / f"{name}-{SETTING}"
    assert files(folder).keys() == LAYOUTS[name]
    assert files(folder) == files(tmp_path / "two" / folder.name)
    record = json.loads(run_record(folder).read_text())
    images = 7 if name == "mjhq30k" else 28
    assert record["complete"] and record["nfe"] == 5 and record["speed"]["images_drawn"] >= images
    image = np.asarray(Image.open(folder / next(k for k in LAYOUTS[name] if k.endswith(".png") and "grid" not in k)))
    assert image.shape == ((32, 48, 3) if name == "dpgbench" else (16, 24, 3)) and image.std() > 0


def test_geneval_metadata_and_grid_belong_to_the_prompt(models, prompts, tmp_path):
    command(*arguments(models, prompts, "geneval", tmp_path, "--num-fid-samples", 2))
    folder = tmp_path / f"geneval-{SETTING}"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["00000", "00001"]
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text())["prompt"] == PROMPTS[1]
    grid = np.asarray(Image.open(folder / "00001" / "grid.png"))
    third = np.asarray(Image.open(folder / "00001" / "samples" / "00002.png"))
    assert (grid[20:36, 2:26] == third).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMMANDS))
def test_benchmarks_continue_after_kill_9(models, prompts, tmp_path, name):
    flags = ["--num-steps", "60", "--per-proc-batch-size", "2"]
    command(*arguments(models, prompts, name, tmp_path / "whole", *flags))
    (folder,) = (p for p in (tmp_path / "whole").iterdir() if p.is_dir())
    killed = tmp_path / "killed" / folder.name
    words = arguments(models, prompts, name, tmp_path / "killed", *flags)
    start_and_kill(words, lambda: len(list(killed.rglob("*.png"))) >= 2)
    assert 0 < len(files(killed)) < len(files(folder))
    with pytest.raises(ValueError, match=r"sampling is not finished|sampling has gaps"):
        sampled_images(killed)
    command(*arguments(models, prompts, name, tmp_path / "killed", *flags))
    assert files(killed) == files(folder)
    assert len(sampled_images(killed)) == (28 if name == "geneval" else 7)


def sampler_of(models, guided=True, padding="mask", **settings):
    config = load_config(models / "config.yaml", [f"model.text_padding={padding}"])
    settings = SampleSettings(height=16, width=24, num_steps=4, cfg_scale=2.5 if guided else 1.0, **settings)
    return load_sampler(config, find_weights(models / "w.safetensors"), settings, torch.device("cpu"))


@pytest.mark.parametrize("guided", [False, True])
def test_seven_prompts_at_once_are_seven_prompts_alone(models, guided):
    sampler = sampler_of(models, guided)
    images, latents = sampler.draw(PROMPTS)
    for k, prompt in enumerate(PROMPTS):
        image, latent = sampler.draw([prompt], [k])
        assert (latent[0] - latents[k]).abs().max() < 1e-5 * latents.abs().max()
        assert (image[0] == images[k]).all()
    assert len({image.tobytes() for image in images}) == 7


def test_an_image_depends_on_seed_prompt_and_repetition_alone(models):
    sampler = sampler_of(models)
    dogs, cow = PROMPTS[2], PROMPTS[5]
    images, _ = sampler.draw([dogs, dogs, cow], [2, 2, 5], [0, 1, 0])
    again, _ = sampler.draw([cow, dogs], [5, 2], [0, 1])
    assert (again[0] == images[2]).all() and (again[1] == images[1]).all()
    assert (images[0] != images[1]).any()
    for other, _ in (sampler_of(models, global_seed=1).draw([dogs], [2]), sampler.draw([dogs], [3])):
        assert (other[0] != images[0]).any()


def test_visible_padding_lets_batch_mates_in(models):
    """What `text_padding: batch` reproduces: the image of a short prompt changes with the longest prompt of its batch."""
    sampler = sampler_of(models, padding="batch")
    short, long = PROMPTS[3], PROMPTS[5]
    (alone, beside), (lone, _) = sampler.draw([short, long])[0], sampler.draw([short, short])[0]
    assert (alone != lone).any() and beside.shape == (16, 24, 3)
    masked = sampler_of(models)
    assert (masked.draw([short, long])[0][0] == masked.draw([short, short])[0][0]).all()


def test_captions_are_computed_once(models, monkeypatch):
    """One encoding a prompt and one of the null caption, one set of keys and values a prompt, whatever the steps."""
    encoded, embedded = [], []
    encode, embed = TextEncoder.__call__, TiM.caption_keys_values
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, captions: encoded.extend(captions) or encode(self, captions))
    monkeypatch.setattr(TiM, "caption_keys_values", lambda self, y: embedded.append(len(y)) or embed(self, y))
    inside = []
    monkeypatch.setattr(TiM, "_embed_caption", lambda self, y, f=TiM._embed_caption: inside.append(len(y)) or f(self, y))
    sampler = sampler_of(models)
    first, second, third = PROMPTS[:3]
    sampler.draw([first] * 4 + [second] * 2, [0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 0, 1])
    sampler.draw([third], [2], [0])
    sampler.draw([third], [2], [1])
    assert sorted(encoded) == sorted(["", *PROMPTS[:3]])
    assert embedded == [1, 2, 1] and inside == embedded


def test_prepared_captions_change_nothing(models):
    """Steps with prepared keys and values give what the network gives on caption features."""
    sampler = sampler_of(models, guided=False)
    encoder = TextEncoder(str(models / "text"))
    y, y_mask = encoder(PROMPTS[:3])
    x, times = torch.randn(3, 8, 4, 6), torch.tensor([0.9, 0.5, 0.2])
    cond, _ = sampler.conditions(PROMPTS[:3], guided=False)
    with torch.no_grad():
        direct = sampler.network(x, times, times / 2, y, y_mask=y_mask)
        prepared = sampler.network(x, times, times / 2, **cond)
    assert (direct - prepared).abs().max() < 1e-6 * direct.abs().max()


def test_free_prompts_at_several_sizes_and_steps(models, tmp_path):
    done = command(
        "projects/sample/sample_t2i.py", "--config", models / "config.yaml", "--ckpt", models / "w.safetensors",
        "--sample-dir", tmp_path, "--prompts", "a red circle", "naïve 狐", "", "--size", "16x24", "32x16",
        "--num-steps", 1, 4, "--images-per-prompt", 2, "--cfg-scale", 2, "--guide-first-step",
    )  # fmt: skip
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert len(folders) == 4 and folders[0].startswith("prompts-w-16x24-T0.0-1.0-Step-1-")
    for name in folders:
        assert len(list((tmp_path / name).glob("*.png"))) == 6
    assert Image.open(tmp_path / folders[2] / "00001-01.png").size == (16, 32)
    assert Image.open(tmp_path / "grid-16x24.png").width > 4 * 96 and "grid-32x16.png" in done.stdout
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\nnaïve 狐\n", encoding="utf-8")
    command(
        "projects/sample/sample_t2i.py", "--config", models / "config.yaml", "--ckpt", models / "w.safetensors",
        "--sample-dir", tmp_path / "file", "--prompt-file", file, "--height", 16, "--width", 24, "--num-steps", 4,
        "--cfg-scale", 2, "--guide-first-step",
    )  # fmt: skip
    (folder,) = (p for p in (tmp_path / "file").iterdir() if p.is_dir())
    assert len(list(folder.glob("*.png"))) == 2


@pytest.mark.parametrize(
    "flags,match",
    [
        (["--height", "18"], "--height 18 is not a multiple of 4 (autoencoder x patch); the nearest are 16 and 20"),
        (["--num-fid-samples", "0"], "--num-fid-samples must be >= 1"),
        (["--caption-dir", "absent.jsonl"], "absent.jsonl"),
        (["--images-per-prompt", "0"], "--images-per-prompt must be >= 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(models, prompts, tmp_path, flags, match):
    done = command(*arguments(models, prompts, "geneval", tmp_path / "out", *flags), check=False)
    assert done.returncode == 2 and match in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_broken_prompt_sets_are_named(models, prompts, tmp_path):
    def refused(name, path, match):
        done = command(*arguments(models, {name: path}, name, tmp_path / "out"), check=False)
        assert done.returncode == 2 and match in done.stderr, done.stderr

    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    refused("geneval", tmp_path / "a.jsonl", "line 2 is not JSON")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"tag": "x"}\n')
    refused("geneval", tmp_path / "b.jsonl", "line 2 has no `prompt`")
    (tmp_path / "empty").mkdir()
    refused("dpgbench", tmp_path / "empty", "no .txt file")
    (tmp_path / "m.json").write_text('{"k": {"prompt": "a"}}')
    refused("mjhq30k", tmp_path / "m.json", "category")
    (tmp_path / "evil.json").write_text('{"k": {"prompt": "a", "category": "../up"}}')
    refused("mjhq30k", tmp_path / "evil.json", "no usable")
    (tmp_path / "long.json").write_text(json.dumps({"k" * 300: {"prompt": "a", "category": "art"}}))
    refused("mjhq30k", tmp_path / "long.json", "no usable")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    refused("mjhq30k", tmp_path / "deep.json", "not in the form")
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud83e"}\n')
    refused("geneval", tmp_path / "half.jsonl", "half a character")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "café"}\n'.encode("latin-1"))
    refused("geneval", tmp_path / "latin.jsonl", "latin.jsonl line 2 is not UTF-8")
    refused("geneval", prompts["dpgbench"], "sample_t2i_dpgbench_ddp.py reads folders")


def test_prompts_of_other_editors_and_machines(tmp_path):
    """Byte order marks and line ends of Windows are no part of a prompt, hidden files none at all."""
    (tmp_path / "own.txt").write_bytes("\ufeffa café\r\n\r\ntwo dogs\r\n".encode())
    assert read_prompts(str(tmp_path / "own.txt")) == ["a café", "two dogs"]
    (tmp_path / "1.txt").write_bytes("\ufeffa cow".encode())
    (tmp_path / "._1.txt").write_bytes(b"\xff\x00")
    (tmp_path / "own.txt").unlink()
    found = DPGPrompts(tmp_path)
    assert (found.names, found.prompts) == (["1"], ["a cow"])


def test_other_prompts_do_not_continue_a_folder(models, prompts, tmp_path):
    command(*arguments(models, prompts, "dpgbench", tmp_path / "out", "--num-fid-samples", 1))
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "prompt_0.txt").write_text("something else")
    done = command(*arguments(models, {"dpgbench": tmp_path / "dpg"}, "dpgbench", tmp_path / "out"), check=False)
    assert done.returncode == 2 and "holds images of another run (prompts" in done.stderr


def test_visible_padding_ties_a_folder_to_its_batch_size(models, prompts, tmp_path):
    flags = ["--num-fid-samples", 2, "--num-steps", 1, "--cfg-scale", 1, "--text-padding", "batch"]
    command(*arguments(models, prompts, "mjhq30k", tmp_path, *flags))
    done = command(*arguments(models, prompts, "mjhq30k", tmp_path, *flags, "--per-proc-batch-size", 2), check=False)
    assert done.returncode == 2 and "per_proc_batch_size: 6 there, 2 now" in done.stderr


def test_a_text_encoder_of_another_width_is_refused(models, prompts, tmp_path):
    save_tiny_text_encoder(tmp_path / "wide", width=24)
    tree = yaml.safe_load((models / "config.yaml").read_text())
    tree["model"]["text_encoder_dir"] = str(tmp_path / "wide")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    words = arguments(models, prompts, "mjhq30k", tmp_path / "out", "--config", tmp_path / "config.yaml")
    done = command(*words, check=False)
    assert done.returncode == 2 and "24 wide" in done.stderr and "cap_feat_dim" in done.stderr
