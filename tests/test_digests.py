"""Digests of weights are remembered as long as a file stays the same, and never beyond."""

import hashlib
import json
import os

import pytest

from tim import digests


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """Names of the files that are really hashed; a day has passed since whatever the test writes."""
    names = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 1)
    monkeypatch.setattr(digests.time, "time", lambda now=digests.time.time: now() + 86400)
    monkeypatch.setattr(digests, "sha256", lambda path, real=digests.sha256: names.append(path.name) or real(path))
    return names


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_once_as_long_as_it_is_the_same(hashed, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"one")
    (tmp_path / "link").symlink_to(path)
    assert {digests.cached_sha256(p) for p in (path, path, tmp_path / "link")} == {digest(b"one")} and len(hashed) == 1
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(b"two")  # as long as before, in the same inode
    os.utime(path, ns=times)
    assert path.stat().st_mtime_ns == times[1] and digests.cached_sha256(path) == digest(b"two")
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, ns=times)
    other.replace(path)
    assert digests.cached_sha256(path) == digest(b"six") == digests.cached_sha256(path) and len(hashed) == 3


def test_a_file_that_may_still_change_is_not_trusted(hashed, tmp_path, monkeypatch):
    path = tmp_path / "w"
    path.write_bytes(b"one")
    written = path.stat().st_mtime
    for age, times in ((1, 2), (-5, 4), (3, 5)):  # in the end it is remembered
        monkeypatch.setattr(digests.time, "time", lambda age=age: written + age)
        assert digests.cached_sha256(path) == digests.cached_sha256(path) == digest(b"one") and len(hashed) == times


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(hashed, tmp_path, monkeypatch):
    path = tmp_path / "w"
    path.write_bytes(b"one")

    def slow(path, real=digests.sha256):
        found = real(path)
        path.write_bytes(b"more")
        return found

    monkeypatch.setattr(digests, "sha256", slow)
    digests.cached_sha256(path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("sha256.json"))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 100000, b'{"PATH": 1}', b'{"PATH": {"stamp": STAMP, "sha256": 7}}']
)
def test_a_damaged_memory_only_costs_time(hashed, tmp_path, content):
    path = tmp_path / "w"
    path.write_bytes(b"one")
    digests.cached_sha256(path)
    store = tmp_path / "cache" / "tim" / "sha256.json"
    stamp = json.loads(store.read_bytes())[str(path)]["stamp"]
    store.write_bytes(content.replace(b"PATH", bytes(path)).replace(b"STAMP", json.dumps(stamp).encode()))
    assert digests.cached_sha256(path) == digests.cached_sha256(path) == digest(b"one") and len(hashed) == 2


def test_without_a_place_to_remember_files_are_hashed(hashed, tmp_path, monkeypatch):
    path = tmp_path / "w"
    path.write_bytes(b"one")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert digests.cached_sha256(path) == digests.cached_sha256(path) == digest(b"one")
    assert len(hashed) == 4


def test_no_more_is_remembered_than_is_of_use(hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "KEPT", 2)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"one")
        digests.cached_sha256(path)
    digests.cached_sha256(paths[2]), digests.cached_sha256(paths[1])
    assert hashed == ["a", "b", "c"]
