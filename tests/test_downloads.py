"""The download scripts: every path that is needed has a source, and fetching survives what networks do."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from helpers.download_site import Site, tar_bytes, tree, zip_bytes
from helpers.paths import ROOT
from PIL import Image

SCRIPTS = sorted(p.name for p in (ROOT / "tools").glob("download_*.sh"))
GENEVAL = "raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
MJHQ = "huggingface.co/datasets/playgroundai/MJHQ-30K/resolve/main"
ELLA = "TencentQQGYLab/ELLA"
ADM = "openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
INCEPTION = "github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
LATENTS = "datasets/GoodEnough/NiT-Preprocessed-ImageNet1K/resolve/main"
FOLDERS = {"256x256": "sd-vae-ft-ema-256x256", "512x512": "dc-ae-f32c32-sana-1.1-diffusers-512x512"}
TOY = "datasets/GoodEnough/TiM-Toy-T2I-Dataset/resolve/main"
PROMPTS = b'{"prompt": "a photo of a bench"}\n' * 553

# Needed paths that no download script can produce, and why.
ELSEWHERE = {
    "datasets/imagenet1k/images/train": "ImageNet needs an account and a licence",
    "datasets/imagenet1k/latents_dc_ae_native_512": "made from ImageNet by scripts/preprocess",
    "datasets/openmoji": "scripts/quickstart_t2i.sh",
    "datasets/openmoji_64": "scripts/quickstart_t2i.sh",
    "datasets/shapes": "scripts/quickstart_t2i.sh",
    "datasets/all-MiniLM-L6-v2": "scripts/demo_data.sh",
    "datasets/finetune": "pictures of one's own",
    "datasets/nature": "made by the command of the page that names it",
    "datasets/openmoji_transport": "made by the command of the page that names it",
    "datasets/openmoji_more": "made by the command of the page that names it",
}
EVALUATION = (
    "checkpoints/pt_inception-2015-12-05-6726825d.pth",
    "checkpoints/classify_image_graph_def.pb",
    "checkpoints/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",
    "datasets/imagenet/VIRTUAL_imagenet256_labeled.npz",
    "datasets/imagenet/VIRTUAL_imagenet512.npz",
    "datasets/dpg_bench/dpg_bench.csv",
    "datasets/mjhq30k/images",
)


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def home(tmp_path):
    """A copy of the repository's tools, so that downloads land in a temporary folder."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def bash(home, script, *flags, site=None, **env):
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.lower().endswith("_proxy")}
    mirror = {"DOWNLOAD_MIRROR": site.url} if site else {}
    home_of_hub = {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    full = {
        **kept,
        **home_of_hub,
        "PYTHON": sys.executable,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        **mirror,
        **env,
    }
    return subprocess.run(["bash", f"tools/{script}", *flags], cwd=home, env=full, capture_output=True, text=True)


def fetch(home, site, script, *flags, **env):
    """Run a script that must succeed; what it printed."""
    done = bash(home, script, *flags, site=site, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def planned(home):
    """Targets of all scripts' dry runs, with what is fetched only when it is chosen."""
    runs = [(script, []) for script in SCRIPTS]
    runs += [("download_benchmarks.sh", ["--with-images"]), ("download_toy_t2i_dataset.sh", ["--only", "coco"])]
    runs += [("download_benchmarks.sh", ["--only", name]) for name in ("reference-256", "reference-512")]
    lines = [
        line.split(" -> ") for script, flags in runs for line in bash(home, script, "--dry-run", *flags).stdout.splitlines()
    ]
    assert all(len(line) == 2 and line[0].startswith(("https://", "http://images.cocodataset.org/")) for line in lines)
    return {target for _, target in lines}


def strings(node):
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node


def needed(tmp_path):
    """Paths under checkpoints/ and datasets/ in configurations, launchers (as they call Python), entry points and docs."""
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    texts = ["\n".join(strings(yaml.safe_load(p.read_text()))) for p in (ROOT / "configs").rglob("*.yaml")]
    for script in sorted((ROOT / "scripts").glob("*/**/*.sh")):
        env = {**os.environ, "PYTHON": str(fake), "GPUS": "1"}
        texts.append(subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True).stdout)
    texts += [
        p.read_text() for folder in ("projects", "docs") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md")
    ]
    texts.append((ROOT / "README.md").read_text())
    found = {m.rstrip("/.") for text in texts for m in re.findall(r"(?<![\w/.-])(?:checkpoints|datasets)/[\w./-]+", text)}
    of_a_project = ("checkpoints/step-", "checkpoints/checkpoint-N")
    return {path for path in found if not path.startswith(of_a_project)}


def below(path, folders):
    return any(path == f or path.startswith(f"{f}/") for f in folders)


def test_every_needed_path_has_a_source(home, tmp_path):
    targets, paths = planned(home), needed(tmp_path)
    assert {"checkpoints/c2i_model_256.safetensors", "datasets/t2i_toy_dataset", "datasets/openmoji/images"} <= paths
    assert set(EVALUATION) <= targets
    orphans = {
        p for p in paths if not below(p, targets) and not below(p, ELSEWHERE) and not any(below(t, [p]) for t in targets)
    }
    assert not orphans, "no tool produces these"
    for path, producer in ELSEWHERE.items():
        assert any(below(p, [path]) for p in paths), f"{path} is needed no more"
        if producer.endswith(".sh"):
            assert path.split("/")[1] in (ROOT / producer).read_text()


def test_inception_weights_are_fetched_under_a_name_the_evaluation_looks_for(home):
    from tim.evaluation.inception import FILES, FOLDER

    assert len({str(FOLDER / name) for name in FILES} & planned(home)) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line(home, script):
    assert subprocess.run(["bash", "-n", home / "tools" / script]).returncode == 0
    before = tree(home)
    help_text = bash(home, script, "--help").stdout
    names = re.findall(r"^    (\w[\w-]*)  ", help_text, re.MULTILINE)
    assert "[--only NAME]" in help_text and "--dry-run" in help_text and "HF_ENDPOINT" in help_text and names
    for name in set(names) if "imagenet" not in script else names[:1]:
        assert " -> " in bash(home, script, "--dry-run", "--only", name).stdout
    for flags in (["--only", "nothing"], ["--only"], ["--dryrun"]):
        done = bash(home, script, *flags)
        assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1] and done.stdout == ""
    assert tree(home) == before


def rename_checks(home, **contents):
    """Let checks of the table, named by how they begin, want stand-in files."""
    table = home / "tools/downloads.yaml"
    text = table.read_text()
    for check, stand_in in contents.items():
        kind, wanted = check.split("_")
        new = {"sha256": hashlib.sha256(stand_in).hexdigest(), "bytes": str(len(stand_in))}[kind]
        text, count = re.subn(rf"{kind}:{wanted}\w*", f"{kind}:{new}", text)
        assert count == 1
    table.write_text(text)


def test_benchmarks_are_fetched_once(home, site):
    names = ("README.md", "dpg_bench/prompts/7.txt", "dpg_bench/prompts/COCO 1.txt", "dpg_bench/compute.py")
    batch = io.BytesIO()
    np.savez(batch, arr_0=np.arange(1000, dtype=np.uint8), mu=np.zeros(8))
    pictures = zip_bytes({f"mjhq30k_imgs/{category}/1.jpg": b"picture" for category in ("animals", "art")})
    site.files = {
        GENEVAL: PROMPTS,
        f"raw.githubusercontent.com/{ELLA}/main/dpg_bench/dpg_bench.csv": b"item_id,text\nheader,x\n",
        f"github.com/{ELLA}/archive/refs/heads/main.tar.gz": tar_bytes({f"ELLA-main/{name}": name.encode() for name in names}),
        f"download.openmmlab.com/mmdetection/v2.0/mask2former/{DETECTOR}/{DETECTOR}_20220504_001756-743b7d99.pth": b"detector",
        INCEPTION: b"inception",
        f"{ADM}/classify_image_graph_def.pb": b"graph",
        f"{ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz": batch.getvalue(),
        f"{ADM}/imagenet/512/VIRTUAL_imagenet512.npz": batch.getvalue(),
    }
    site.publish(f"{MJHQ}/meta_data.json", b"{}")
    site.publish(f"{MJHQ}/mjhq30k_imgs.zip", pictures)
    rename_checks(
        home, sha256_dacdc43=pictures, sha256_6726825=b"inception", sha256_743b7d99=b"detector", bytes_95673916=b"graph"
    )
    every = [word for name in ("reference-256", "reference-512") for word in ("--only", name)]
    printed = [fetch(home, site, "download_benchmarks.sh", *flags) for flags in (["--with-images"], every)]
    assert (
        "complete: datasets/geneval/evaluation_metadata.jsonl datasets/dpg_bench/dpg_bench.csv" in printed[0].splitlines()[-1]
    )
    assert tree(home / "datasets") == {
        "geneval/evaluation_metadata.jsonl",
        "dpg_bench/dpg_bench.csv",
        "dpg_bench/prompts/7.txt",
        "dpg_bench/prompts/COCO 1.txt",
        "mjhq30k/meta_data.json",
        "mjhq30k/images/animals/1.jpg",
        "mjhq30k/images/art/1.jpg",
        "imagenet/VIRTUAL_imagenet256_labeled.npz",
        "imagenet/VIRTUAL_imagenet512.npz",
    }
    assert tree(home / "checkpoints") == {p.removeprefix("checkpoints/") for p in EVALUATION if p.startswith("checkpoints")}
    assert (home / "datasets/dpg_bench/prompts/7.txt").read_text() == "dpg_bench/prompts/7.txt"
    site.requests.clear()
    again = fetch(home, site, "download_benchmarks.sh", "--with-images")
    assert again.count("have ") == 8 and not site.requests


def test_truncated_reference_batch_is_refused(home, site):
    batch = io.BytesIO()
    np.savez(batch, arr_0=np.arange(1000, dtype=np.uint8), mu=np.zeros(8))
    site.files = {f"{ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz": batch.getvalue()[:900]}
    done = bash(home, "download_benchmarks.sh", "--only", "reference-256", site=site)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "kept as datasets/imagenet/VIRTUAL_imagenet256_labeled.npz.bad" in done.stderr


def test_missing_file_and_no_server(home, site):
    done = bash(home, "download_benchmarks.sh", "--only", "geneval", site=site)
    assert done.returncode == 2 and f"error: {site.url}/{GENEVAL}: HTTP status 404" in done.stderr
    assert not (home / "datasets").exists() or not tree(home / "datasets")
    done = bash(home, "download_benchmarks.sh", "--only", "geneval", DOWNLOAD_MIRROR="http://127.0.0.1:9")
    assert done.returncode == 2 and "Connection refused; run the command again to continue" in done.stderr
    for wrong in ({"HF_ENDPOINT": site.url}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        done = bash(home, "download_checkpoints.sh", "--only", "t2i", **wrong)
        assert done.returncode == 2 and "TiM-T2I/resolve/main/t2i_model.bin: " in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_published_weights(home, site):
    contents = {
        name: name.encode() * 400 for name in ("c2i_model_256.safetensors", "c2i_model_512.safetensors", "t2i_model.bin")
    }
    for name, weights in contents.items():
        site.publish(f"GoodEnough/TiM-{name[:3].upper()}/resolve/main/{name}", weights)
    site.publish("nvidia/RADIO/resolve/main/radio-v2.5-b_half.pth.tar", b"RADIO")
    rename_checks(home, sha256_6bff4bd7=b"RADIO")
    fetch(home, None, "download_checkpoints.sh", HF_ENDPOINT=f"{site.url}/")
    assert tree(home / "checkpoints") == {*contents, "radio/radio-v2.5-b_half.pth.tar"}
    assert all((home / "checkpoints" / name).read_bytes() == weights for name, weights in contents.items())
    site.requests.clear()
    assert fetch(home, None, "download_checkpoints.sh", HF_ENDPOINT=site.url).count("have ") == 4 and not site.requests
    (home / "checkpoints/t2i_model.bin").unlink()
    site.publish("me/mine/resolve/main/t2i_model.bin", b"mine")
    fetch(home, None, "download_checkpoints.sh", "--only", "t2i", HF_ENDPOINT=site.url, TIM_T2I_REPO="me/mine")
    assert (home / "checkpoints/t2i_model.bin").read_bytes() == b"mine"


def test_weights_of_the_hub_are_resumed_and_checked(home, site):
    path, target = "GoodEnough/TiM-T2I/resolve/main/t2i_model.bin", home / "checkpoints/t2i_model.bin"
    site.publish(path, PROMPTS)
    site.cuts = [5000, 0, 0]
    flags = ["download_checkpoints.sh", "--only", "t2i"]
    done = bash(home, *flags, HF_ENDPOINT=site.url)
    assert done.returncode == 2 and "run the command again to continue" in done.stderr and not target.exists()
    site.requests.clear()
    fetch(home, None, *flags, HF_ENDPOINT=site.url)
    assert target.read_bytes() == PROMPTS and site.requests[-1] == ("GET", f"storage.example/{path}", "bytes=5000-")
    target.unlink()
    site.files[f"storage.example/{path}"] = PROMPTS[1:]
    done = bash(home, *flags, HF_ENDPOINT=site.url)
    assert done.returncode == 2 and f"expected {hashlib.sha256(PROMPTS).hexdigest()}" in done.stderr
    assert tree(target.parent) == {"t2i_model.bin.bad"}


@pytest.mark.parametrize("size", FOLDERS)
def test_published_latents_are_fetched_one_by_one(home, site, size):
    folder, script = FOLDERS[size], f"download_imagenet_{size}.sh"
    names = re.findall(r"^    (n\d+_n\d+) ", bash(home, script, "--help").stdout, re.MULTILINE)
    assert len(names) == 20
    for name in names:
        members = {f"{wnid}/{wnid}_1.safetensors": name.encode() for wnid in name.split("_")}
        site.publish(f"{LATENTS}/{folder}/{name}.zip", zip_bytes(members))
    last = site.files.pop(f"{LATENTS}/{folder}/{names[-1]}.zip")
    done = bash(home, script, HF_ENDPOINT=site.url)
    assert done.returncode == 2 and names[-1] in done.stderr
    site.files[f"{LATENTS}/{folder}/{names[-1]}.zip"] = last
    site.requests.clear()
    again = fetch(home, None, script, HF_ENDPOINT=site.url)
    assert again.count("have ") == 19 and {path.rpartition("/")[2] for _, path, _ in site.requests} == {f"{names[-1]}.zip"}
    classes = {wnid for name in names for wnid in name.split("_")}
    assert tree(home / "datasets/imagenet1k") == {f"{folder}/{wnid}/{wnid}_1.safetensors" for wnid in classes}
    assert {p.name for p in (home / "datasets/imagenet1k" / folder).iterdir() if p.is_dir()} == classes
    assert "https://image-net.org" in bash(home, script, "--help").stdout


def test_archive_that_leads_outside_is_refused(home, site):
    folder, name = FOLDERS["256x256"], "n01440764_n01697457"
    site.publish(f"{LATENTS}/{folder}/{name}.zip", zip_bytes({"n01440764/1": b"", "../../../escaped": b""}))
    done = bash(home, "download_imagenet_256x256.sh", "--only", name, HF_ENDPOINT=site.url)
    assert done.returncode == 2 and "'../../../escaped' leads outside the folder" in done.stderr
    assert tree(home / "datasets") == {f"imagenet1k/{folder}/{name}.zip.bad"}


def image(shade):
    file = io.BytesIO()
    Image.new("RGB", (96, 64), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def test_coco_becomes_a_set_to_train_on(home, site):
    from tim.data.t2i import CaptionedImages

    photos = zip_bytes({f"val2017/{k:012d}.jpg": image(60 * k) for k in range(3)})
    coco = {
        "images": [{"id": k, "file_name": f"{k:012d}.jpg"} for k in range(3)],
        "annotations": [{"image_id": k % 3, "caption": f"café {k}\n"} for k in range(6)],
    }
    captions = zip_bytes({"annotations/captions_val2017.json": json.dumps(coco).encode()})
    names = "images.cocodataset.org/zips/val2017.zip", "images.cocodataset.org/annotations/annotations_trainval2017.zip"
    site.files = dict(zip(names, (photos, captions), strict=True))
    rename_checks(home, sha256_4f7e2ccb=photos, sha256_113a836d=captions)
    fetch(home, site, "download_toy_t2i_dataset.sh", "--only", "coco")
    folder = home / "datasets/t2i_coco"
    assert {p.name for p in folder.iterdir()} == {"images", "captions.jsonl", "data_info.jsonl", "bucket_sampler.json"}
    lines = [json.loads(line) for line in (folder / "data_info.jsonl").read_text().splitlines()]
    assert [line["captions"] for line in lines] == [["café 0", "café 3"], ["café 1", "café 4"], ["café 2", "café 5"]]
    data = CaptionedImages(folder / "images", folder / "data_info.jsonl", folder / "bucket_sampler.json", factor=32)
    assert len(data) == 3
    assert "have" in fetch(home, site, "download_toy_t2i_dataset.sh", "--only", "coco")


def test_published_toy_set(home, site):
    small = {
        "bucket_categorization.json": b"{}",
        "bucket_sampler.json": b"[[0]]",
        "data_info.jsonl": b'{"image_file": "0.png"}',
    }
    for name, contents in small.items():
        site.publish(f"{TOY}/{name}", contents, large=False)
    site.publish(f"{TOY}/dataset.tar.gz", tar_bytes({"images/0.png": b"picture", "images/deep/1.png": b""}))
    fetch(home, None, "download_toy_t2i_dataset.sh", HF_ENDPOINT=site.url)
    folder = home / "datasets/t2i_toy_dataset"
    assert tree(folder) == {*small, "images/0.png", "images/deep/1.png"}
    assert (folder / "data_info.jsonl").read_bytes() == small["data_info.jsonl"]
    site.requests.clear()
    assert fetch(home, None, "download_toy_t2i_dataset.sh", HF_ENDPOINT=site.url).count("have ") == 4 and not site.requests
    (folder / "bucket_sampler.json").unlink()
    contents, headers = site.files[f"{TOY}/bucket_sampler.json"]
    site.files[f"{TOY}/bucket_sampler.json"] = contents[1:], headers
    done = bash(home, "download_toy_t2i_dataset.sh", HF_ENDPOINT=site.url)
    assert done.returncode == 2 and "bucket_sampler.json.bad" in done.stderr and "git sha1" in done.stderr


def test_the_download_commands_of_the_documentation_are_understood():
    text = "".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    commands = set(re.findall(r"^    bash (tools/download_\w+\.sh[^#\n]*)", text, re.MULTILINE))
    assert any("--only" in words for words in commands)
    for words in commands:
        env = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(["bash", *words.split(), "--dry-run"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and " -> " in done.stdout, f"{words}: {done.stderr}"
