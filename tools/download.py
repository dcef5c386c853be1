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
from dataclasses import dataclass, replace
from pathlib import Path

from tim.cli import HelpFormatter, command_parser, run_command
from tim.download import File, fetch, locate
from tim.typed_yaml import build_typed, read_tree

TABLE = Path(__file__).with_name("downloads.yaml")
REPOSITORIES = {  # environment variables that name another one
    "GoodEnough/TiM-C2I": "TIM_C2I_REPO",
    "GoodEnough/TiM-T2I": "TIM_T2I_REPO",
    "GoodEnough/TiM-Toy-T2I-Dataset": "TIM_TOY_REPO",
}


@dataclass
class Item:
    """What --only chooses; optional ones are fetched only then."""

    name: str
    files: list[File]
    optional: bool = False

    def __post_init__(self) -> None:
        self.files = [replace(file, source=self.fill(file.source)) for file in self.files]

    def fill(self, source: str) -> str:
        """A source of the table with this item's name, and of the repository that the environment names."""
        for repository, variable in REPOSITORIES.items():
            source = source.replace(f"/{repository}/", f"/{os.environ.get(variable) or repository}/")
        return source.replace("{name}", self.name)

    def listing(self) -> str:
        """Its lines in the help: where the files go."""
        lines = []
        for file in self.files:
            remarks = [file.size] * bool(file.size) + ["only when chosen"] * self.optional
            lines.append(f"    {self.name:<20} {file.target}" + (f" ({', '.join(remarks)})" if remarks else ""))
        return "\n".join(lines)


@dataclass
class Group:
    """What one of the download scripts fetches."""

    about: str
    items: list[Item]


def parse(groups: dict[str, Group]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="group", required=True, metavar="GROUP")
    for name, group in groups.items():
        command = commands.add_parser(
            name,
            help=group.about,
            description=f"{group.about}\n\n{__doc__}",
            epilog="\n".join(["what --only chooses, and where it goes:", *(item.listing() for item in group.items)]),
            formatter_class=HelpFormatter,
        )
        names = [item.name for item in group.items]
        command.add_argument("--only", action="append", choices=names, metavar="NAME", help="fetch this; may be repeated")
        command.add_argument("--dry-run", action="store_true", help="print what would be fetched, and to where; write nothing")
        command.set_defaults(with_images=False)
    commands.choices["benchmarks"].add_argument("--with-images", action="store_true", help="MJHQ-30K's images too")
    return parser.parse_args()


def fetch_item(item: Item) -> None:
    """Fetch the files of an item; COCO also becomes a set to train on."""
    folder = Path(item.files[0].target).parent
    if item.name == "coco" and (folder / "bucket_sampler.json").exists():
        print(f"have {folder}")
        return
    for file in item.files:
        fetch(file)
    if item.name == "coco":
        build_coco_set(folder)


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


def main() -> None:
    groups = {name: build_typed(Group, tree, name) for name, tree in read_tree(TABLE).items()}
    args = parse(groups)
    items = {item.name: item for item in groups[args.group].items}
    names = args.only or [name for name, item in items.items() if not item.optional]
    if args.with_images and not args.only:
        names.append("mjhq-images")
    files = [file for name in names for file in items[name].files]
    if args.dry_run:
        for file in files:
            print(f"{locate(file.source)}{f' ({file.size})' if file.size else ''} -> {file.target}")
        return
    for name in names:
        fetch_item(items[name])
    print("complete:", *dict.fromkeys(file.target for file in files))


if __name__ == "__main__":
    run_command(main)
