"""The download scripts: every path that is needed has a source, and fetching survives what networks do."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml
from download_site import Site, tree, zipped
from helpers.captioned import save_captioned_images
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import load_file, save

SCRIPTS = sorted(p.name for p in (ROOT / "tools").glob("download_*.sh"))
GENEVAL = "raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
RADIO = "huggingface.co/nvidia/RADIO/resolve/main/radio-v2.5-b_half.pth.tar"
ADM = "openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
WEIGHTS = "huggingface.co/Good-Fellow/TiM-T2I/resolve/main/t2i_model"
TOY = "datasets/Good-Fellow/TiM-Toy-T2I-Dataset"
PROMPTS = b'{"prompt": "a photo of a bench"}\n' * 553

# Needed paths that no download script can produce, and why.
ELSEWHERE = {
    "datasets/imagenet1k/train": "ImageNet needs an account and a licence",
    "datasets/imagenet1k/latents_sd_vae_256": "made from ImageNet by scripts/preprocess",
    "datasets/imagenet1k/latents_dc_ae_512": "made from ImageNet by scripts/preprocess",
    "datasets/imagenet1k/latents_dc_ae_native_512": "made from ImageNet by scripts/preprocess",
    "datasets/openmoji": "scripts/quickstart_t2i.sh",
    "datasets/openmoji_64": "scripts/quickstart_t2i.sh",
    "datasets/shapes": "scripts/quickstart_t2i.sh",
    "datasets/all-MiniLM-L6-v2": "scripts/quickstart_t2i.sh",
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
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "common.sh", tmp_path / "scripts")
    return tmp_path


def bash(home, script, *flags, site=None, **env):
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.lower().endswith("_proxy")}
    mirror = {"DOWNLOAD_MIRROR": site.url} if site else {}
    full = {**kept, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **mirror, **env}
    return subprocess.run(["bash", f"tools/{script}", *flags], cwd=home, env=full, capture_output=True, text=True)


def fetch(home, site, script, *flags, **env):
    """Run a script that must succeed; what it printed."""
    done = bash(home, script, *flags, site=site, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def planned(home):
    """Targets of all scripts' dry runs."""
    large = {"download_benchmarks.sh": ["--with-images"]}
    printed = [bash(home, script, "--dry-run", *large.get(script, [])).stdout for script in SCRIPTS]
    lines = [line.split(" -> ") for text in printed for line in text.splitlines()]
    assert all(len(line) == 2 and line[0].startswith("https://") for line in lines)
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
    return {path for path in found if not path.startswith("checkpoints/step-")}


def below(path, folders):
    return any(path == f or path.startswith(f"{f}/") for f in folders)


def test_every_needed_path_has_a_source(home, tmp_path):
    targets, paths = planned(home), needed(tmp_path)
    assert {"checkpoints/c2i_model_256.safetensors", "datasets/t2i_toy_dataset/images", "datasets/openmoji/images"} <= paths
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
    assert f"{script} [--only NAME" in help_text and "--dry-run" in help_text and names
    assert "source" not in help_text.split() and "set -e" not in help_text
    for name in names:
        assert " -> " in bash(home, script, "--dry-run", "--only", name).stdout
    for flags in (["--only", "nothing"], ["--only"], ["--dryrun"]):
        done = bash(home, script, *flags)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == ""
    assert tree(home) == before


def test_benchmarks_are_fetched_once(home, site):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        for name in ("README.md", "dpg_bench/prompts/7.txt", "dpg_bench/prompts/COCO 1.txt", "dpg_bench/compute.py"):
            member = tarfile.TarInfo(f"ELLA-main/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    ella = "raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
    meta = json.dumps({f"{k:x}": {"category": "art", "prompt": "x"} for k in range(30000)}).encode()
    site.files = {
        GENEVAL: PROMPTS,
        ella: b"item_id,text\nheader,x\n",
        "github.com/TencentQQGYLab/ELLA/archive/refs/heads/main.tar.gz": tar.getvalue(),
        "huggingface.co/datasets/playgroundai/MJHQ-30K/resolve/main/meta_data.json": meta,
    }
    flags = ["--only", "geneval", "--only", "dpg", "--only", "mjhq"]
    fetch(home, site, "download_benchmarks.sh", *flags)
    assert tree(home / "datasets") == {
        "geneval/evaluation_metadata.jsonl",
        "dpg_bench/dpg_bench.csv",
        "dpg_bench/prompts/7.txt",
        "dpg_bench/prompts/COCO 1.txt",
        "mjhq30k/meta_data.json",
    }
    assert (home / "datasets/dpg_bench/prompts/7.txt").read_text() == "dpg_bench/prompts/7.txt"
    site.requests.clear()
    again = fetch(home, site, "download_benchmarks.sh", *flags)
    assert again.count("have ") == 4 and not site.requests


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "starts-afresh"])
def test_partial_file_is_continued(home, site, ranges):
    site.files, site.ranges = {GENEVAL: PROMPTS}, ranges
    part = home / "datasets/geneval/evaluation_metadata.jsonl.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(PROMPTS[:1000])
    fetch(home, site, "download_benchmarks.sh", "--only", "geneval")
    assert part.with_suffix("").read_bytes() == PROMPTS and not part.exists()
    assert [asked for *_, asked in site.requests] == (["bytes=1000-"] if ranges else ["bytes=1000-", None])


def test_broken_connection_is_continued_by_the_next_run(home, site):
    site.files, site.cut = {GENEVAL: PROMPTS}, 2000
    done = bash(home, "download_benchmarks.sh", "--only", "geneval", site=site)
    target = home / "datasets/geneval/evaluation_metadata.jsonl"
    assert done.returncode == 1 and "run the command again to continue" in done.stderr and not target.exists()
    fetch(home, site, "download_benchmarks.sh", "--only", "geneval")
    assert target.read_bytes() == PROMPTS and site.requests[-1][2] == "bytes=2000-"


def test_complete_part_is_taken_without_fetching_it_again(home, site):
    """The last run was killed between the last byte and the new name."""
    site.files = {GENEVAL: PROMPTS}
    target = home / "datasets/geneval/evaluation_metadata.jsonl"
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.part").write_bytes(PROMPTS)
    fetch(home, site, "download_benchmarks.sh", "--only", "geneval")
    assert target.read_bytes() == PROMPTS


def test_wrong_checksum(home, site):
    site.files = {RADIO: b"not RADIO"}
    target = home / "checkpoints/radio/radio-v2.5-b_half.pth.tar"
    done = bash(home, "download_checkpoints.sh", "--only", "radio", site=site)
    assert done.returncode == 1 and "expected 6bff4bd7" in done.stderr and f"{target.name}.bad" in done.stderr
    assert tree(target.parent) == {f"{target.name}.bad"}
    target.write_bytes(b"mine")
    done = bash(home, "download_checkpoints.sh", "--only", "radio", site=site)
    assert done.returncode == 1 and "is not the published file; move it away" in done.stderr
    assert target.read_bytes() == b"mine"


def test_missing_file_and_no_server(home, site):
    done = bash(home, "download_benchmarks.sh", "--only", "geneval", site=site)
    assert done.returncode == 1 and f"error: {site.url}/{GENEVAL}: HTTP status 404" in done.stderr
    assert not (home / "datasets").exists() or not tree(home / "datasets")
    done = bash(home, "download_benchmarks.sh", "--only", "geneval", DOWNLOAD_MIRROR="http://127.0.0.1:9")
    assert done.returncode == 1 and "no answer" in done.stderr


def test_truncated_reference_batch_is_refused(home, site):
    batch = io.BytesIO()
    np.savez(batch, arr_0=np.arange(1000, dtype=np.uint8), mu=np.zeros(8))
    path, target = f"{ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz", home / "datasets/imagenet"
    site.files = {path: batch.getvalue()[:900]}
    done = bash(home, "download_imagenet_256x256.sh", "--only", "reference", site=site)
    assert done.returncode == 1 and "kept as datasets/imagenet/VIRTUAL_imagenet256_labeled.npz.bad" in done.stderr
    site.files = {path: batch.getvalue()}
    assert "https://image-net.org" in fetch(home, site, "download_imagenet_256x256.sh", "--only", "reference")
    assert np.load(target / "VIRTUAL_imagenet256_labeled.npz")["arr_0"][-1] == 999 % 256


def test_weights_are_safetensors_whatever_is_published(home, site):
    state = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)}
    target = home / "checkpoints/t2i_model.safetensors"
    pickled = io.BytesIO()
    torch.save({"model": state}, pickled)
    for suffix, contents in ((".safetensors", save(state)), (".bin", pickled.getvalue())):
        site.files = {WEIGHTS + suffix: contents}
        fetch(home, site, "download_checkpoints.sh", "--only", "t2i")
        loaded = load_file(target)
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
        assert tree(target.parent) == {target.name}
        target.unlink()
    site.files = {"hub/me/mine/resolve/main/t2i_model.safetensors": save(state)}
    fetch(home, None, "download_checkpoints.sh", "--only", "t2i", HF_ENDPOINT=f"{site.url}/hub/", TIM_T2I_REPO="me/mine")
    assert target.is_file()
    target.unlink()
    done = bash(home, "download_checkpoints.sh", "--only", "t2i", site=site)
    assert done.returncode == 1 and f"{WEIGHTS}.bin: HTTP status 404" in done.stderr


def test_missing_curl(home):
    (home / "bin").mkdir()
    for name in ("bash", "dirname", "basename"):
        (home / "bin" / name).symlink_to(shutil.which(name))
    done = bash(home, "download_benchmarks.sh", PATH=str(home / "bin"))
    assert done.returncode == 1 and "curl is missing" in done.stderr and "apt-get install curl" in done.stderr


def image(shade):
    file = io.BytesIO()
    Image.new("RGB", (96, 64), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def test_coco_becomes_a_set_to_train_on(home, site):
    from tim.data.t2i import CaptionedImages

    photos = zipped(home / "p.zip", **{f"val2017/{k:012d}.jpg": image(60 * k) for k in range(3)}).read_bytes()
    coco = {
        "images": [{"id": k, "file_name": f"{k:012d}.jpg"} for k in range(3)],
        "annotations": [{"image_id": k % 3, "caption": f"café {k}\n"} for k in range(6)],
    }
    captions = zipped(home / "c.zip", **{"annotations/captions_val2017.json": json.dumps(coco)}).read_bytes()
    names = "images.cocodataset.org/zips/val2017.zip", "images.cocodataset.org/annotations/annotations_trainval2017.zip"
    site.files = dict(zip(names, (photos, captions), strict=True))
    script = home / "tools/download_toy_t2i_dataset.sh"
    text = script.read_text()
    for digest, contents in zip(re.findall(r"sha256:([0-9a-f]{64})", text), (photos, captions), strict=True):
        text = text.replace(digest, hashlib.sha256(contents).hexdigest())
    script.write_text(text)
    fetch(home, site, script.name, "--only", "coco")
    folder = home / "datasets/t2i_toy_dataset"
    assert {p.name for p in folder.iterdir()} == {"images", "captions.jsonl", "data_info.jsonl", "bucket_sampler.json"}
    lines = [json.loads(line) for line in (folder / "data_info.jsonl").read_text().splitlines()]
    assert [line["captions"] for line in lines] == [["café 0", "café 3"], ["café 1", "café 4"], ["café 2", "café 5"]]
    data = CaptionedImages(folder / "images", folder / "data_info.jsonl", folder / "bucket_sampler.json", factor=32)
    assert len(data) == 3
    assert "have" in fetch(home, site, script.name, "--only", "coco")


def serve_hub(site, folder):
    """The parts of the hub's interface that fetching a repository uses."""
    commit, entries = "0" * 40, []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, contents = str(path.relative_to(folder)), path.read_bytes()
        etag = hashlib.sha1(contents).hexdigest()
        entries.append({"type": "file", "path": name, "size": len(contents), "oid": etag})
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        site.files[f"huggingface.co/{TOY}/resolve/{commit}/{name}"] = (contents, headers)
    revision = {"id": TOY.partition("/")[2], "sha": commit, "siblings": [{"rfilename": e["path"]} for e in entries]}
    site.files[f"huggingface.co/api/{TOY}/revision/main"] = json.dumps(revision).encode()
    site.files[f"huggingface.co/api/{TOY}/tree/{commit}"] = json.dumps(entries).encode()


def test_published_toy_set(home, site):
    source = home / "source"
    save_captioned_images(source, count=6)
    pictures = {f"images/{p.name}": p.read_bytes() for p in (source / "images").iterdir()}
    zipped(source / "images.zip", **pictures)
    shutil.rmtree(source / "images")
    serve_hub(site, source)
    fetch(home, site, "download_toy_t2i_dataset.sh", HF_HUB_DISABLE_XET="1")
    folder = home / "datasets/t2i_toy_dataset"
    assert sorted(p.name for p in (folder / "images").iterdir()) == [f"{k}.png" for k in range(6)]
    assert (folder / "data_info.jsonl").read_bytes() == (source / "data_info.jsonl").read_bytes()
    assert not (folder / "images.zip").exists() and not folder.with_name(f"{folder.name}.part").exists()
    site.requests.clear()
    assert "have" in fetch(home, site, "download_toy_t2i_dataset.sh") and not site.requests


def test_unusable_toy_set(home, site):
    """What was fetched is kept, the folder does not appear, and the message names a way out."""
    (home / "source").mkdir()
    (home / "source/pictures.txt").write_text("elsewhere")
    serve_hub(site, home / "source")
    done = bash(home, "download_toy_t2i_dataset.sh", site=site)
    assert done.returncode == 2 and "has no images, data_info.jsonl, bucket_sampler.json" in done.stderr
    assert "holds pictures.txt" in done.stderr and "--only coco" in done.stderr
    assert not (home / "datasets/t2i_toy_dataset").exists() and (home / "datasets/t2i_toy_dataset.part/pictures.txt").is_file()
    site.files.clear()
    shutil.rmtree(home / "datasets")
    done = bash(home, "download_toy_t2i_dataset.sh", site=site)
    assert done.returncode == 2 and "error: data set Good-Fellow/TiM-Toy-T2I-Dataset cannot be fetched" in done.stderr


def test_the_download_commands_of_the_documentation_are_understood():
    text = "".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    commands = set(re.findall(r"^    bash (tools/download_\w+\.sh[^#\n]*)", text, re.MULTILINE))
    assert any("--only" in words for words in commands)
    for words in commands:
        done = subprocess.run(["bash", *words.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and " -> " in done.stdout, f"{words}: {done.stderr}"
