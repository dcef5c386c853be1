"""Fetch weights, prompts, latents and what judges them, to where the configurations look for them.

Run the same command again to continue: a file goes to FILE.part, resumes, and gets its name after it passed its check (sha256
where it is published); archives are unpacked and removed. What is there is not fetched again, what fails is kept as FILE.bad.
HF_ENDPOINT names a mirror of the Hugging Face hub; with DOWNLOAD_MIRROR=URL every https://HOST/PATH comes from URL/HOST/PATH.
TIM_C2I_REPO, TIM_T2I_REPO and TIM_TOY_REPO name other hub repositories.
"""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

from tim.cli import run_command
from tim.download import File, fetch, locate

TIM_C2I = "hf://" + os.environ.get("TIM_C2I_REPO", "GoodEnough/TiM-C2I")
TIM_T2I = "hf://" + os.environ.get("TIM_T2I_REPO", "GoodEnough/TiM-T2I")
TOY_SET = "hf://datasets/" + os.environ.get("TIM_TOY_REPO", "GoodEnough/TiM-Toy-T2I-Dataset")
TOY_FOLDER = "datasets/t2i_toy_dataset"
LATENTS = "hf://datasets/GoodEnough/NiT-Preprocessed-ImageNet1K"
LATENT_ZIPS = (  # named by their first and last class
    "n01440764_n01697457", "n01698640_n01855672", "n01860187_n02074367", "n02077923_n02097298", "n02097474_n02110063",
    "n02110185_n02138441", "n02165105_n02415577", "n02417914_n02667093", "n02669723_n02859443", "n02860847_n03041632",
    "n03042490_n03291819", "n03297495_n03530642", "n03532672_n03743016", "n03759954_n03884397", "n03887697_n04033901",
    "n04033995_n04239074", "n04243546_n04398044", "n04399382_n04560804", "n04562935_n07745940", "n07747607_n15075141",
)  # fmt: skip
MJHQ = "hf://datasets/playgroundai/MJHQ-30K"
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts"
DPG = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench"
ADM_BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
MASK2FORMER = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
# openmmlab and torch name files by the first digits of their sha256
MMDETECTION = f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{MASK2FORMER}"
COCO_FOLDER = "datasets/t2i_coco"
COCO = "http://images.cocodataset.org"  # its certificate belongs to another host, so the checksums are what is trusted

OPTIONAL = ("mjhq-images", "reference-256", "reference-512", "coco")  # fetched only when they are chosen


def latents(folder: str) -> dict[str, list[File]]:
    """The published latents of ImageNet's training images: archives of class folders."""
    target = f"datasets/imagenet1k/{folder}"
    return {name: [File(f"{LATENTS}/{folder}/{name}.zip", target, unpack=name.partition("_")[0])] for name in LATENT_ZIPS}


# fmt: off
GROUPS: dict[str, dict[str, list[File]]] = {
    "checkpoints": {
        "radio": [File("hf://nvidia/RADIO/radio-v2.5-b_half.pth.tar", "checkpoints/radio/radio-v2.5-b_half.pth.tar", "0.65 GB",
                       "sha256:6bff4bd732d815136652d454598e8fe6c6f4e658716d5e6a697f0e6b60bd8a98")],
        "c2i-256": [File(f"{TIM_C2I}/c2i_model_256.safetensors", "checkpoints/c2i_model_256.safetensors", "up to 2.7 GB")],
        "c2i-512": [File(f"{TIM_C2I}/c2i_model_512.safetensors", "checkpoints/c2i_model_512.safetensors", "up to 2.7 GB")],
        "t2i": [File(f"{TIM_T2I}/t2i_model.bin", "checkpoints/t2i_model.bin", "up to 3.5 GB")],
    },
    "benchmarks": {
        "geneval": [File(f"{GENEVAL}/evaluation_metadata.jsonl", "datasets/geneval/evaluation_metadata.jsonl", "< 1 MB",
                         "lines:553")],
        "dpg": [File(f"{DPG}/dpg_bench.csv", "datasets/dpg_bench/dpg_bench.csv", check="begins:item_id,"),
                File("https://github.com/TencentQQGYLab/ELLA/archive/refs/heads/main.tar.gz", "datasets/dpg_bench/prompts",
                     unpack="dpg_bench/prompts/*.txt")],
        "mjhq": [File(f"{MJHQ}/meta_data.json", "datasets/mjhq30k/meta_data.json", "about 10 MB")],
        "mjhq-images": [File(f"{MJHQ}/mjhq30k_imgs.zip", "datasets/mjhq30k/images", "3.6 GB",
                             "sha256:dacdc4328f294696ef0ee389be4bcf3fc96d112060ef10c13384836b54d4a8ec", unpack="animals")],
        "inception": [File(f"{TORCH_FIDELITY}/weights-inception-2015-12-05-6726825d.pth",
                           "checkpoints/pt_inception-2015-12-05-6726825d.pth", "96 MB",
                           "sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
                      File(f"{ADM_BATCHES}/classify_image_graph_def.pb", "checkpoints/classify_image_graph_def.pb", "96 MB",
                           "bytes:95673916")],
        "detector": [File(f"{MMDETECTION}/{MASK2FORMER}_20220504_001756-743b7d99.pth",
                          f"checkpoints/mask2former/{MASK2FORMER}.pth", "0.3 GB", "sha256:743b7d99")],
        "reference-256": [File(f"{ADM_BATCHES}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
                               "datasets/imagenet/VIRTUAL_imagenet256_labeled.npz", "2 GB", "zip damage:none")],
        "reference-512": [File(f"{ADM_BATCHES}/imagenet/512/VIRTUAL_imagenet512.npz",
                               "datasets/imagenet/VIRTUAL_imagenet512.npz", "up to 8 GB", "zip damage:none")],
    },
    "imagenet_256x256": latents("sd-vae-ft-ema-256x256"),
    "imagenet_512x512": latents("dc-ae-f32c32-sana-1.1-diffusers-512x512"),
    "toy_t2i_dataset": {
        "hub": [File(f"{TOY_SET}/bucket_categorization.json", f"{TOY_FOLDER}/bucket_categorization.json"),
                File(f"{TOY_SET}/bucket_sampler.json", f"{TOY_FOLDER}/bucket_sampler.json"),
                File(f"{TOY_SET}/data_info.jsonl", f"{TOY_FOLDER}/data_info.jsonl"),
                File(f"{TOY_SET}/dataset.tar.gz", TOY_FOLDER, unpack="*")],
        "coco": [File(f"{COCO}/zips/val2017.zip", f"{COCO_FOLDER}/images", "0.8 GB",
                      "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", unpack="*.jpg"),
                 File(f"{COCO}/annotations/annotations_trainval2017.zip", f"{COCO_FOLDER}/annotations.zip", "0.25 GB",
                      "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268")],
    },
}
# fmt: on
ABOUT = {
    "checkpoints": "RADIO, the target of REPA, and TiM's published weights",
    "benchmarks": "prompts, judges and reference statistics of the evaluations",
    "imagenet_256x256": "SD-VAE latents of ImageNet's training images (the images need an account: https://image-net.org)",
    "imagenet_512x512": "DC-AE latents of ImageNet's training images (the images need an account: https://image-net.org)",
    "toy_t2i_dataset": "captioned pictures to try text-to-image training: TiM's (hub), or 5,000 photographs (coco)",
}


def build_coco_set(folder: Path) -> None:
    """Turn COCO's annotations into captions and buckets."""
    annotations, captions = folder / "annotations.zip", defaultdict(list)
    with zipfile.ZipFile(annotations) as z:
        coco = json.loads(z.read("annotations/captions_val2017.json"))
    for entry in coco["annotations"]:
        captions[entry["image_id"]].append(entry["caption"].strip())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    lines = [json.dumps({"image_file": files[k], "captions": captions[k]}, ensure_ascii=False) for k in sorted(captions)]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = [str(folder / "captions.jsonl"), "--root", str(folder / "images"), "--out", str(folder)]
    sizes = ["--area", "512", "--factor", "32", "--tokens-per-batch", "16384"]
    subprocess.run([sys.executable, str(Path(__file__).with_name("build_t2i_buckets.py")), *paths, *sizes], check=True)
    annotations.unlink()


def listing(items: dict[str, list[File]]) -> str:
    """The items of a group for its --help."""
    lines = ["what --only chooses, and where it goes:"]
    for name, files in items.items():
        for file in files:
            remarks = [file.size] * bool(file.size) + ["only when chosen"] * (name in OPTIONAL)
            lines.append(f"    {name:<20} {file.target}" + (f" ({', '.join(remarks)})" if remarks else ""))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = parser.add_subparsers(dest="group", required=True, metavar="GROUP")
    for name, items in GROUPS.items():
        group = groups.add_parser(
            name,
            help=ABOUT[name],
            description=f"{ABOUT[name]}\n\n{__doc__}",
            epilog=listing(items),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        group.add_argument("--only", action="append", choices=items, metavar="NAME", help="fetch this; may be repeated")
        group.add_argument("--dry-run", action="store_true", help="print what would be fetched, and to where; write nothing")
    groups.choices["benchmarks"].add_argument("--with-images", action="store_true", help="MJHQ-30K's pictures too")
    return parser.parse_args()


def main() -> None:
    args = parse()
    items = GROUPS[args.group]
    names = args.only or [name for name in items if name not in OPTIONAL]
    if not args.only and getattr(args, "with_images", False):
        names.append("mjhq-images")
    for name in names:
        if args.dry_run:
            for file in items[name]:
                print(f"{locate(file.source)}{f' ({file.size})' if file.size else ''} -> {file.target}")
        elif name == "coco" and Path(COCO_FOLDER, "bucket_sampler.json").exists():
            print(f"have {COCO_FOLDER}")
        else:
            for file in items[name]:
                fetch(file)
            if name == "coco":
                build_coco_set(Path(COCO_FOLDER))
    if not args.dry_run:
        print("complete:", *dict.fromkeys(file.target for name in names for file in items[name]))


if __name__ == "__main__":
    run_command(main)
