"""Checking and unpacking what was downloaded."""

import pytest
import torch
from download_site import tree, zipped
from helpers.commands import command
from safetensors.torch import save


def files(*words, error=None):
    done = command("tools/download_files.py", *words, check=error is None)
    assert error is None or (done.returncode == 2 and error in done.stderr), done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("contents", "passes", "fails", "error"),
    [
        (b"abc", "sha256:ba7816bf", "sha256:ba7816b0", "sha256 is ba7816bf, expected ba7816b0"),
        (b"abc", "bytes:3", "bytes:4", "size is 3, expected 4"),
        (b"a\n\nb", "lines:2", "lines:3", "number of lines is 2, expected 3"),
        (b'{"a": 1}', "json:1", "json:2", "number of entries is 1, expected 2"),
        (b"\xef\xbb\xbfitem_id,text", "head:item_id,", "head:<html", "the beginning is item_"),
        (b"<html>", "head:<", "json:1", "Expecting value"),
        (b"<html>", "head:<", "zip", "not a zip file"),
        (b"<html>", "head:<", "gzip", "Not a gzipped file"),
        (b"<html>", "head:<", "safetensors", "no whole safetensors file"),
        (save({"a": torch.zeros(9)})[:-4], "head:", "safetensors", "no whole safetensors file"),
    ],
)
def test_rules(tmp_path, contents, passes, fails, error):
    file = tmp_path / "file"
    file.write_bytes(contents)
    files("check", file, passes)
    files("check", file, fails, error=error)


def test_damaged_zip_is_found(tmp_path):
    archive = zipped(tmp_path / "a.zip", a=b"contents")
    files("check", archive, "zip")
    archive.write_bytes(archive.read_bytes().replace(b"contents", b"c0ntents", 1))
    files("check", archive, "zip", error="first damaged member is a")


def test_unpacking(tmp_path):
    nested = {"all/imgs/animals/1.jpg": b"1", "all/imgs/art/2.jpg": b"2", "__MACOSX/all/._1.jpg": b"x"}
    files("unpack", zipped(tmp_path / "n.zip", **nested), tmp_path / "n")
    assert tree(tmp_path / "n") == {"animals/1.jpg", "art/2.jpg"}
    (tmp_path / "i.part").mkdir()  # left by a killed run
    (tmp_path / "i.part/half").write_bytes(b"")
    files("unpack", tmp_path / "n.zip", tmp_path / "i", "imgs/art")
    assert tree(tmp_path / "i") == {"2.jpg"}
    outside = zipped(tmp_path / "o.zip", **{"a.txt": b"", "../../escaped": b""})
    files("unpack", outside, tmp_path / "o", error="leads outside the folder")
    files("unpack", tmp_path / "n.zip", tmp_path / "e", "nowhere", error="has no files in nowhere")
    (tmp_path / "x.tar").write_bytes(b"no archive")
    files("unpack", tmp_path / "x.tar", tmp_path / "e", error="x.tar cannot be unpacked")
    assert not (tmp_path / "o").exists() and not (tmp_path / "e").exists() and not (tmp_path.parent / "escaped").exists()
