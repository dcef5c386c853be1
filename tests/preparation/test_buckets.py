"""From pictures with captions to buckets and back: the tool, the pure functions, the dataset that reads the result."""

import io
import json
import tarfile

import numpy as np
import pytest
from helpers.commands import command
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from tim import rng
from tim.data.t2i import CaptionedImages
from tim.preparation.buckets import bucket_sizes, build_buckets, native_size
from tim.preparation.captioned import Record

SHAPES = [(512, 512), (640, 427), (427, 640), (300, 299), (900, 225), (100, 1000), (333, 777), (777, 333), (64, 48)]  # (w, h)
TOOL = "tools/build_t2i_buckets.py"


def draw(size):
    """A red ellipse that touches all sides of a blue picture."""
    image = Image.new("RGB", size, "blue")
    ImageDraw.Draw(image).ellipse((0, 0, size[0] - 1, size[1] - 1), fill="red")
    return image


@pytest.fixture
def folder(tmp_path):
    """Two photographs and drawings of odd shapes in two folders, each with a caption file."""
    root = tmp_path / "pictures"
    (root / "drawn").mkdir(parents=True)
    for number, picture in enumerate(load_sample_images().images):
        Image.fromarray(picture).save(root / f"photo{number}.jpg")
        (root / f"photo{number}.txt").write_text(f"a photograph 写真 {number}\r\n\r\n  another view\n", encoding="utf-8")
    for number, size in enumerate(SHAPES):
        draw(size).save(root / "drawn" / f"{number}.png")
        (root / "drawn" / f"{number}.txt").write_text("a red ellipse on blue\n")
    return root


def records(shapes):
    return [Record(f"{n}.png", h, w, ["a"]) for n, (w, h) in enumerate(shapes)]


def random_records(count=400):
    g = np.random.default_rng(0)
    return records(np.exp(g.uniform(np.log(150), np.log(3000), (count, 2))).astype(int).tolist())


def info(out):
    return [json.loads(line) for line in (out / "data_info.jsonl").read_text(encoding="utf-8").splitlines()]


def load(out, root, **kwargs):
    return CaptionedImages(str(root), str(out / "data_info.jsonl"), str(out / "bucket_sampler.json"), **kwargs)


def test_a_folder_becomes_a_dataset(folder, tmp_path):
    printed = command(TOOL, folder, "--out", tmp_path / "out", "--area", 128, "--tokens-per-batch", 64).stdout
    data = load(tmp_path / "out", folder)
    assert len(data) == 2 + len(SHAPES)
    assert sorted(np.concatenate(data.batches).tolist()) == list(range(len(data))), "every picture in exactly one batch"
    for batch in data.batches:
        for index in batch:
            sample = data.load(int(index), rng.generator(0, "data"))
            assert sample["image"].shape == (3, *data.size(batch[0]))
    entries = info(tmp_path / "out")
    photo = next(e for e in entries if e["image_file"] == "photo0.jpg")
    assert photo["captions"] == ["a photograph 写真 0", "another view"] and photo["bucket"] == "bucket-96x160"
    assert "写真" in (tmp_path / "out" / "data_info.jsonl").read_text(encoding="utf-8"), "not escaped"
    for text in ("96x160", f"{len(data)} images", "mean crop loss", f"root_dir={folder}"):
        assert text in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bucket_sampler.json", "data_info.jsonl"]


def test_the_same_command_writes_the_same_bytes_and_the_seed_shuffles(folder, tmp_path):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        command(TOOL, folder, "--out", out, "--area", 64, "--batch-size", 1, "--max-aspect", 1, "--seed", seed)
    packed, lines = ([(out / name).read_bytes() for out in outs] for name in ("bucket_sampler.json", "data_info.jsonl"))
    assert packed[0] == packed[1] != packed[2] and lines[0] == lines[1] == lines[2]
    assert len(json.loads(packed[0])) == 2 + len(SHAPES), "one square bucket, one picture a batch"


def test_a_jsonl_with_one_caption_or_several(folder, tmp_path):
    lines = [
        {"image_file": "photo0.jpg", "caption": "a temple"},
        {"image_file": "drawn/0.png", "captions": ["an ellipse", "une ellipse rouge é", " "], "score": 1},
    ]
    source = folder / "captions.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    command(TOOL, source, "--out", tmp_path / "out", "--tokens-per-batch", 512)
    assert [e["captions"] for e in info(tmp_path / "out")] == [["a temple"], ["an ellipse", "une ellipse rouge é"]]
    moved = source.rename(tmp_path / "captions.jsonl")
    command(TOOL, moved, "--root", folder, "--out", tmp_path / "moved", "--tokens-per-batch", 512)
    assert info(tmp_path / "moved") == info(tmp_path / "out")


def add(tar, name, content, **kwargs):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in kwargs.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def encoded(size, kind):
    buffer = io.BytesIO()
    draw(size).save(buffer, kind)
    return buffer.getvalue()


def test_tar_shards_are_unpacked_once(tmp_path):
    for shard in ("00000", "00001"):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            add(tar, "a/000.png", encoded((80, 60), "PNG"))
            add(tar, "a/000.txt", "ein Bild ü".encode())
            add(tar, "a/000.json", json.dumps({"caption": "ein Bild ü", "width": 80}).encode())
            add(tar, "001.webp", encoded((60, 80), "WEBP"))
            add(tar, "001.json", json.dumps({"captions": ["one", "two"]}).encode())
            add(tar, "001.cls", b"3")
    out, pictures = tmp_path / "out", tmp_path / "out" / "images"
    command(TOOL, tmp_path, "--out", out, "--area", 64, "--batch-size", 2)
    expected = {"00000/001.webp": ["one", "two"], "00000/a/000.png": ["ein Bild ü"]}
    expected |= {name.replace("00000/", "00001/"): captions for name, captions in expected.items()}
    assert {e["image_file"]: e["captions"] for e in info(out)} == expected
    assert {p.relative_to(pictures).as_posix() for p in pictures.rglob("*") if p.is_file()} == set(expected)
    assert load(out, pictures).load(0, rng.generator(0, "data"))["image"].shape[1] in (32, 64, 96)
    kept, cut = pictures / "00000" / "001.webp", pictures / "00001" / "001.webp"
    inode = kept.stat().st_ino
    cut.write_bytes(cut.read_bytes()[:20])
    before = (out / "data_info.jsonl").read_bytes()
    command(TOOL, tmp_path / "00000.tar", tmp_path / "00001.tar", "--out", out, "--area", 64, "--batch-size", 2)
    assert kept.stat().st_ino == inode and cut.stat().st_size == kept.stat().st_size
    assert (out / "data_info.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "name,kwargs",
    [
        ("../outside.png", {}),
        ("a/../../outside.png", {}),
        ("/tmp/outside.png", {}),
        ("link.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("hard.png", {"type": tarfile.LNKTYPE, "linkname": "../outside.png"}),
    ],
)
def test_tar_members_that_lead_outside_are_refused(tmp_path, name, kwargs):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, name, b"" if kwargs else encoded((8, 8), "PNG"), **kwargs)
    done = command(TOOL, tmp_path / "s.tar", "--out", tmp_path / "a" / "b", "--batch-size", 1, check=False)
    assert done.returncode == 2 and "leads outside" in done.stderr and name in done.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_pictures_that_cannot_be_used_are_counted_and_named(folder, tmp_path):
    (folder / "drawn" / "0.txt").unlink()
    (folder / "drawn" / "1.txt").write_text("\n \n")
    (folder / "drawn" / "2.txt").write_bytes(b"caf\xe9")
    (folder / "drawn" / "3.png").write_bytes(b"no picture")
    for number in range(8):
        Image.new("RGB", (9, 9)).save(folder / f"z{number}.png")
    printed = command(TOOL, folder, "--out", tmp_path / "out", "--batch-size", 1).stdout
    assert len(info(tmp_path / "out")) == 2 + len(SHAPES) - 4 and "12 images are not used" in printed
    assert (
        printed.count("no caption") == 9
        and "2.txt line 1 is not UTF-8 text" in printed
        and "drawn/3.png cannot be read as an image: cannot identify" in printed
        and "z5.png" in printed
    )
    assert "z6.png" not in printed, "ten are named"


def test_the_header_counts_the_camera_turn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    draw((200, 100)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "turned.txt").write_text("upright")
    command(TOOL, tmp_path, "--out", tmp_path / "out", "--area", 128, "--batch-size", 1)
    height, width = load(tmp_path / "out", tmp_path).size(0)
    assert height > 1.5 * width


@pytest.mark.parametrize("area,factor,max_aspect", [(512, 32, 4), (256, 8, 2), (1024, 32, 3), (64, 64, 1), (320, 64, 4)])
def test_bucket_sizes(area, factor, max_aspect):
    sizes = bucket_sizes(area, factor, max_aspect)
    assert (area, area) in sizes and len(set(sizes)) == len(sizes)
    for h, w in sizes:
        assert h % factor == w % factor == 0 and max(h, w) <= max_aspect * min(h, w) and (w, h) in sizes
        assert abs(h * w - area**2) <= min(h, w) * factor / 2, "no multiple of the factor comes nearer"
    ratios = np.sort([np.log(h / w) for h, w in sizes])
    assert len(sizes) < 3 or np.diff(ratios).max() < 2.1 * factor / min(min(s) for s in sizes)


def test_batches_have_about_the_tokens_asked_for():
    for tokens in (4096, 1000, 10):
        built = build_buckets(random_records(), area=512, factor=32, tokens_per_batch=tokens, max_aspect=3)
        assert sorted(i for batch in built.batches for i in batch) == list(range(400))
        partial = 0
        for batch in built.batches:
            (h, w) = built.sizes[batch[0]]
            assert {built.sizes[i] for i in batch} == {(h, w)}
            one = h * w / 32**2
            assert len(batch) <= built.batch_size[h, w]
            assert built.batch_size[h, w] == 1 or abs(built.batch_size[h, w] * one - tokens) <= one / 2
            partial += len(batch) < built.batch_size[h, w]
        assert partial <= len(built.batch_size), "only the last batch of a bucket is short"


def test_pictures_go_to_the_nearest_aspect_ratio():
    built = build_buckets(random_records(), area=512, factor=32, max_aspect=3)
    ratios = np.log([h / w for h, w in bucket_sizes(512, 32, 3)])
    for record, (h, w) in zip(built.records, built.sizes, strict=True):
        own = np.log(record.height / record.width)
        assert abs(own - np.log(h / w)) <= np.abs(ratios - own).min() + 1e-9
    inside = [r for r in random_records() if 1 / 3 <= r.height / r.width <= 3]
    assert 0 < build_buckets(inside, area=512, factor=32, max_aspect=3).crop_loss() < 0.04
    assert build_buckets(records([(1024, 512)]), area=64, max_aspect=1).crop_loss() == pytest.approx(0.5)


def test_small_buckets_are_merged_into_the_nearest():
    shapes = [(512, 512)] * 5 + [(800, 400)] * 4 + [(512, 448)] + [(420, 800)]
    built = build_buckets(records(shapes), min_bucket=3)
    assert len(built.batch_size) == 2 and len(built.records) == 11
    assert built.sizes[9] == built.sizes[10] == (512, 512) and built.sizes[5][1] > built.sizes[5][0]
    assert len(build_buckets(records(shapes)).batch_size) == 4
    with pytest.raises(ValueError, match=r"no bucket has 6 images, the fullest has 5"):
        build_buckets(records(shapes), min_bucket=6)


def test_pictures_need_not_be_enlarged():
    shapes = [(512, 512), (440, 600), (2000, 1000), (300, 300)]
    built = build_buckets(records(shapes), upscale=False)
    assert [r.image_file for r in built.records] == ["0.png", "2.png"]
    assert built.left_out == ["1.png: smaller than its bucket", "3.png: smaller than its bucket"]
    for record, (h, w) in zip(built.records, built.sizes, strict=True):
        assert record.height >= h and record.width >= w
    with pytest.raises(ValueError, match="all 1 images are smaller"):
        build_buckets(records([(300, 300)]), upscale=False)


def test_native_sizes():
    assert native_size(100, 200, area=512, factor=32) == (96, 192)
    assert native_size(512, 512, 512, 32) == native_size(3000, 3000, 512, 32) == (512, 512)
    assert native_size(512, 2048, 512, 32) == (256, 1024) and native_size(3000, 2000, 512, 32) == (608, 416)
    built = build_buckets(records([(200, 100), (220, 100), (2048, 512), (10, 500)]), native=True, upscale=False)
    assert built.sizes == [(96, 192), (96, 192), (256, 1024)] and built.left_out == ["3.png: smaller than 32 pixels"]
    shapes = [(64, 64)] * 2 + [(96, 64)] + [(480, 480)] * 2
    merged = build_buckets(records(shapes), native=True, min_bucket=2)
    assert merged.sizes[2] == (64, 64), "the nearest in size, not only in aspect ratio"


def test_native_through_the_tool(folder, tmp_path):
    command(TOOL, folder, "--out", tmp_path / "out", "--area", 512, "--batch-size", 2, "--native")
    assert {load(tmp_path / "out", folder).size(i) for i in range(11)} >= {(416, 608), (288, 288), (32, 64), (768, 320)}
    done = command(TOOL, folder, "--out", tmp_path, "--batch-size", 2, "--native", "--max-aspect", 2, check=False)
    assert done.returncode == 2 and "--max-aspect" in done.stderr


def test_mistakes_are_one_line(folder, tmp_path):
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty"
    broken.write_text('{"image_file": "a.png", "caption": "x"}\n{"image_file": \n')
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"image_file": "a.png", "captions": [1]}\n')
    absent = tmp_path / "absent.jsonl"
    absent.write_text('{"image_file": "a.png", "caption": "x"}\n')
    empty.mkdir()
    (tmp_path / "cut.tar").write_bytes(b"")
    cases = [
        ([tmp_path / "nowhere"], "no folder or file"),
        ([empty], "no usable image"),
        ([broken], "line 2:"),
        ([numbers], "line 1: captions must be strings"),
        ([absent], "no usable image .*1 skipped, as a.png"),
        ([tmp_path / "cut.tar"], "neither a folder, nor a .jsonl, nor a tar shard"),
        ([broken, numbers], "several sources must all be tar shards"),
        ([folder, "--root", empty], "does not lie in the root folder"),
        ([folder, "--area", 500], "area=500 is not a multiple of factor=32; the nearest are 480 and 512"),
        ([folder, "--factor", 0], "--factor must be >= 1"),
        ([folder, "--max-aspect", 0.5], "max_aspect must be >= 1"),
        ([folder, "--min-bucket", 0], "--min-bucket must be >= 1, got 0"),
        ([folder, "--batch-size", 0], "--batch-size must be >= 1, got 0"),
    ]
    for words, match in cases:
        size = [] if "--batch-size" in words else ["--batch-size", 4]
        done = command(TOOL, *words, *size, "--out", tmp_path / "out", check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        with pytest.raises(ValueError, match=match):
            raise ValueError(done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_broken_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "000.png", encoded((800, 600), "PNG"))
        add(tar, "000.txt", b"a caption")
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:1500])
    done = command(TOOL, tmp_path / "s.tar", "--out", tmp_path / "out", "--batch-size", 1, check=False)
    assert done.returncode == 2 and "s.tar cannot be read as a tar file" in done.stderr
    (tmp_path / "twice").mkdir()
    for name in ("s.tar", "twice/s.tar"):
        (tmp_path / name).write_bytes(whole)
    done = command(TOOL, tmp_path / "s.tar", tmp_path / "twice/s.tar", "--out", tmp_path, "--batch-size", 1, check=False)
    assert done.returncode == 2 and "several shards are named s" in done.stderr
