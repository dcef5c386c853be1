"""Fetching, checking and unpacking a file."""

import io
import tarfile
from types import SimpleNamespace

import httpx
import pytest
from helpers.download_site import Site, tar_bytes, tree, zip_bytes, zipped

from tim import download
from tim.download import File, fetch, problem, unpack

CONTENTS = bytes(range(256)) * 40


@pytest.fixture
def site(monkeypatch):
    site = Site()
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.mark.parametrize(
    ("contents", "passes", "fails", "difference"),
    [
        (b"abc", "sha256:ba7816bf", "sha256:ba7816b0", "sha256 ba7816bf, expected ba7816b0"),
        (b"abc", "git sha1:f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f", "git sha1:0", "git sha1 f2ba8f84"),
        (b"abc", "bytes:3", "bytes:4", "bytes 3, expected 4"),
        (b"a\n\nb", "lines:2", "lines:3", "lines 2, expected 3"),
        (b"\xef\xbb\xbfitem_id,text", "begins:item_id,", "begins:<html", "begins item_, expected <html"),
        (b"<html>", "begins:<", "zip damage:none", "not a zip file"),
        (b"<html>", "", "bytes:0", "bytes 6"),
    ],
)
def test_checks(tmp_path, contents, passes, fails, difference):
    file = tmp_path / "file"
    file.write_bytes(contents)
    assert problem(file, passes) == "" and difference in problem(file, fails)


def test_damaged_zip_is_found(tmp_path):
    archive = zipped(tmp_path / "a.zip", a=b"contents")
    assert problem(archive, "zip damage:none") == ""
    archive.write_bytes(archive.read_bytes().replace(b"contents", b"c0ntents", 1))
    assert problem(archive, "zip damage:none") == "zip damage a, expected none"


def test_unpacking(tmp_path):
    nested = {"all/imgs/animals/1.jpg": b"1", "all/imgs/art/2.jpg": b"2", "all/x": b"", "__MACOSX/all/imgs/animals/1.jpg": b"x"}
    (tmp_path / "n.zip.unpacked").mkdir()  # left by a killed run
    (tmp_path / "n.zip.unpacked/half").write_bytes(b"")
    (tmp_path / "n/art").mkdir(parents=True)
    (tmp_path / "n/art/own.jpg").write_bytes(b"")
    unpack(zipped(tmp_path / "n.zip", **nested), tmp_path / "n", "animals")
    assert tree(tmp_path / "n") == {"animals/1.jpg", "art/2.jpg", "art/own.jpg"} and tree(tmp_path) >= {"n.zip"}
    assert (tmp_path / "n/animals/1.jpg").read_bytes() == b"1" and not (tmp_path / "n.zip.unpacked").exists()
    (tmp_path / "t.tgz").write_bytes(
        tar_bytes({"main/prompts/1.txt": b"one", "main/prompts/deep/2.txt": b"", "main/3.txt": b""})
    )
    unpack(tmp_path / "t.tgz", tmp_path / "t", "prompts/*.txt")
    assert tree(tmp_path / "t") == {"1.txt", "deep/2.txt"}


def linked_tar(name, target):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, target
        tar.addfile(link)
    return file.getvalue()


@pytest.mark.parametrize(
    ("contents", "error"),
    [
        (zip_bytes({"a.txt": b"", "../../escaped": b""}), "'../../escaped' leads outside the folder"),
        (zip_bytes({"/tmp/escaped": b""}), "'/tmp/escaped' leads outside the folder"),
        (tar_bytes({"a.txt": b"", "../../escaped": b""}), "outside the destination"),
        (linked_tar("out", "../.."), "outside the destination"),
        (linked_tar("out", "/etc"), "absolute path"),
        (zip_bytes({"other": b""}), "it holds no a.txt"),
        (b"no archive", "file could not be opened successfully"),
        (tar_bytes({"a.txt": CONTENTS, "b.txt": CONTENTS[::-1]})[:400], "end"),
    ],
    ids=["zip-above", "zip-absolute", "tar-above", "link-above", "link-absolute", "other-contents", "no-archive", "truncated"],
)
def test_what_is_not_unpacked(tmp_path, contents, error):
    archive, folder = tmp_path / "deep/x/archive", tmp_path / "deep/x/out"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(contents)
    with pytest.raises(ValueError, match=error) as raised:
        unpack(archive, folder, "a.txt")
    assert "archive cannot be unpacked" in str(raised.value) and "\n" not in str(raised.value)
    assert not folder.exists() and not archive.exists() and (tmp_path / "deep/x/archive.bad").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"deep"} and {p.name for p in (tmp_path / "deep").iterdir()} == {"x"}


@pytest.mark.parametrize("pack", [zip_bytes, tar_bytes])
def test_what_would_fill_the_disk_is_not_unpacked(tmp_path, monkeypatch, pack):
    contents = pack({"a": CONTENTS, "b": CONTENTS})
    (tmp_path / "archive").write_bytes(contents)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENTS)))
    with pytest.raises(ValueError, match="'b' and what stands before it need more room than the disk has"):
        unpack(tmp_path / "archive", tmp_path / "out", "a")


def test_links_in_archives_are_left_out(tmp_path):
    (tmp_path / "archive").write_bytes(linked_tar("inside", "there"))
    unpack(tmp_path / "archive", tmp_path / "out", "*")
    assert not (tmp_path / "out").exists()


def ask(site, tmp_path, check=""):
    """Fetch the site's only file; the file and the range of each request."""
    file = File(f"{site.url}/file", str(tmp_path / "file"), check=check)
    fetch(file)
    assert tree(tmp_path) == {"file"}
    return tmp_path.joinpath("file").read_bytes(), [asked for *_, asked in site.requests]


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "starts-afresh"])
def test_broken_connection_is_continued(site, tmp_path, ranges):
    site.files, site.ranges, site.cuts = {"file": CONTENTS}, ranges, [1000, 500]
    assert ask(site, tmp_path) == (CONTENTS, [None, "bytes=1000-", f"bytes={1500 if ranges else 500}-"])


def interrupt(site, tmp_path, **headers):
    site.files, site.cuts = {"file": (CONTENTS, headers)}, [1000] + [0] * (download.ATTEMPTS - 1)
    with pytest.raises(ValueError, match="run the command again to continue"):
        ask(site, tmp_path)
    assert tree(tmp_path) >= {"file.part"} and (tmp_path / "file.part").stat().st_size == 1000
    site.requests.clear()


def test_the_next_run_continues(site, tmp_path):
    interrupt(site, tmp_path)
    assert ask(site, tmp_path) == (CONTENTS, ["bytes=1000-"])


def test_last_modified_is_enough_to_continue_and_a_weak_tag_is_not(site, tmp_path):
    site.if_range = False
    interrupt(site, tmp_path, **{"ETag": 'W/"1"', "Last-Modified": "Sat, 01 Aug 2026 00:00:00 GMT"})
    assert ask(site, tmp_path)[1] == ["bytes=1000-"]
    (tmp_path / "file").unlink()
    site.files = {"file": (CONTENTS, {"ETag": 'W/"1"'})}
    site.requests.clear()
    site.cuts = [1000]
    assert ask(site, tmp_path) == (CONTENTS, [None, None])


@pytest.mark.parametrize("honest", [True, False], ids=["if-range", "server-ignores-if-range"])
def test_changed_file_is_fetched_anew(site, tmp_path, honest):
    interrupt(site, tmp_path)
    site.files, site.if_range = {"file": CONTENTS[::-1]}, honest
    assert ask(site, tmp_path) == (CONTENTS[::-1], ["bytes=1000-"] if honest else ["bytes=1000-", None])


def test_shorter_file_is_fetched_anew(site, tmp_path):
    interrupt(site, tmp_path)
    site.files, site.if_range = {"file": CONTENTS[:500]}, False
    assert ask(site, tmp_path) == (CONTENTS[:500], ["bytes=1000-", None])


def test_complete_part_is_taken_without_fetching_it_again(site, tmp_path):
    """The last run was killed between the last byte and the new name."""
    interrupt(site, tmp_path)
    (tmp_path / "file.part").write_bytes(CONTENTS)
    assert ask(site, tmp_path) == (CONTENTS, [f"bytes={len(CONTENTS)}-"])


def test_part_of_unknown_contents_is_not_trusted(site, tmp_path):
    site.files = {"file": CONTENTS}
    (tmp_path / "file.part").write_bytes(b"of an older program")
    assert ask(site, tmp_path) == (CONTENTS, [None])


def test_wrong_contents(site, tmp_path):
    site.files = {"file": CONTENTS}
    with pytest.raises(ValueError, match=r"sha256 \w{8}, expected 00000000\); kept as .*file.bad"):
        ask(site, tmp_path, "sha256:00000000")
    assert tree(tmp_path) == {"file.bad"}
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"is not the published file .*move it away"):
        ask(site, tmp_path, "sha256:00000000")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_what_the_server_refuses(site, tmp_path):
    with pytest.raises(ValueError, match=f"{site.url}/file: HTTP status 404"):
        ask(site, tmp_path)
    assert len(site.requests) == 1 and not tree(tmp_path)


@pytest.mark.parametrize("target", ["http://elsewhere.example/file", "//elsewhere.example/file"])
def test_redirect_to_plain_http_is_refused(site, tmp_path, target):
    site.files = {"file": target}
    with pytest.raises(ValueError, match=r"leads to http://elsewhere\.example/file, which is not encrypted"):
        ask(site, tmp_path)
    assert not tree(tmp_path)


@pytest.mark.parametrize("target", ["http://127.0.0.1/file", "http://elsewhere.example/file", "ftp://elsewhere.example/file"])
def test_an_encrypted_connection_is_not_left(target):
    request = httpx.Request("GET", "https://hub.example/file")
    with pytest.raises(ValueError, match="which is not encrypted"):
        download.refuse_downgrade(httpx.Response(302, headers={"Location": target}, request=request))
    download.refuse_downgrade(httpx.Response(302, headers={"Location": "https://cdn.example/file"}, request=request))


def test_redirect_on_this_machine_is_followed(site, tmp_path):
    site.files = {"file": "/moved", "moved": f"{site.url.replace('127.0.0.1', 'localhost')}/again", "again": CONTENTS}
    assert ask(site, tmp_path)[0] == CONTENTS
