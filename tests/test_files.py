"""Files that are whole or absent, folders that belong to one run, and work that is shared and continued."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from helpers.paths import ROOT
from safetensors.torch import save_file

from tim.files import (
    append_json_lines,
    claim,
    lock,
    parse_json,
    read_json,
    read_json_lines,
    replacing,
    sha256,
    write_json,
    write_json_lines,
)
from tim.resumable import first_process, locked, own_blocks


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "nothing is left behind"


def test_writers_side_by_side_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the block that ends last wins, whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_written_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    seen = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        seen.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real_sync(descriptor)

    def replace(source, target, **kwargs):
        seen.append("rename")
        real_replace(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_json_lines(tmp_path / "a.jsonl", [1, 2])
    assert seen == ["sync file", "rename", "sync folder"]


def test_results_are_readable_by_whom_the_umask_lets_read(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; os.umask(0o027)\n"
        "import torch; from tim.files import write_json, write_tensors\n"
        "write_json(Path(sys.argv[1]) / 'a.json', 1)\n"
        "write_tensors(Path(sys.argv[1]) / 'a.safetensors', {'x': torch.zeros(2)}, lambda path: None)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    assert {oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {"0o640"}


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / ("n" * 250 + ".json")
    write_json(path, 1)
    assert len(sha256(path)) == 64


def test_errors_of_writers_name_the_file(tmp_path):
    """A full disk names nothing, and torch and safetensors have errors of their own."""

    def fail(error):
        raise error

    writers = {
        "python": lambda partial: Path("/dev/full").write_text("x"),
        "torch": lambda partial: torch.save({"x": torch.zeros(9)}, "/dev/full"),
        "safetensors": lambda partial: save_file({"x": torch.zeros(9)}, partial / "no folder"),
        "picture": lambda partial: fail(OSError("encoder error -2 when writing image file")),
    }
    for name, write in writers.items():
        with pytest.raises(OSError, match=str(tmp_path / f"{name}.out")), replacing(tmp_path / f"{name}.out") as partial:
            write(partial)
    with pytest.raises(FileNotFoundError, match="'absent'"), replacing(tmp_path / "other.out"):
        Path("absent").read_bytes()  # what was read keeps its own name
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "absent" / "a.json")), replacing(tmp_path / "absent" / "a.json"):
        pass
    assert not list(tmp_path.iterdir()), "nothing is left behind"


TORN = {
    "nothing": b"", "brace": b"{", "half": b'{"step": 2', "zeros": b"\x00\x00\xff", "list": b"[1]\n", "number": b"2\n",
    "keyless": b'{"step": 2}\n', "deep": b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line_is_lost_alone(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    append_json_lines(path, [{"step": 1, "cause": "é\u2028"}])
    with open(path, "ab") as f:
        f.write(TORN[torn])
    append_json_lines(path, [{"step": 3, "cause": ""}, {"step": 4, "cause": ""}])
    assert [record["step"] for record in read_json_lines(path, "step", "cause")] == [1, 3, 4]
    assert read_json_lines(path)[0]["cause"] == "é\u2028" and read_json_lines(tmp_path / "absent.jsonl") == []


def test_a_folder_belongs_to_its_settings(tmp_path):
    record = tmp_path / "run" / "identity.json"
    claim(record, {"seed": 1, "size": (8, 8)}, "images", write=False)
    assert not record.exists()
    claim(record, {"seed": 1, "size": (8, 8)}, "images")
    claim(record, {"size": [8, 8]}, "images")
    with pytest.raises(ValueError, match=r"run holds images of another run \(seed: 1 there, 2 now\); choose another folder"):
        claim(record, {"seed": 2, "size": [8, 8]}, "images")
    assert json.loads(record.read_text()) == {"seed": 1, "size": [8, 8]}
    claim(tmp_path / "deep.json", {"options": {"crop": 1, "color": None, "size": 8}}, "images")
    for options, words in (({"crop": 1, "size": 9}, "size: 8 there, 9 now"), ({"size": 8}, "crop: 1 there, None now")):
        with pytest.raises(ValueError, match=rf"another run \(options\.{words}\)"):
            claim(tmp_path / "deep.json", {"options": options}, "images")
    with pytest.raises(ValueError, match="another run"):
        claim(tmp_path / "deep.json", {"options": {"crop": 1, "size": 8}}, "images")
    record.write_text("[")
    with pytest.raises(ValueError, match=r"identity\.json does not say what .*run holds"):
        claim(record, {"seed": 1}, "images")


def test_files_without_a_record_are_not_adopted(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images of an unknown run \(no run\.json\)"):
        claim(tmp_path / "run.json", {}, "images", files="*.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_one_run_at_a_time_and_a_killed_one_lets_go(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from tim.files import lock\n"
        "with lock(Path(sys.argv[1])): child = os.fork(); child and print(child, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(other.stdout.readline())
    held = rf"another run is at work in {tmp_path} \(process {other.pid} on {socket.gethostname()} since \d{{4}}-.*\d\d\); wait"
    with pytest.raises(ValueError, match=held), lock(tmp_path):
        pass
    holder = json.loads((tmp_path / ".lock.holder").read_text())
    write_json(tmp_path / ".lock.holder", {**holder, "host": "node7"})
    gone = rf"since .*, last wrote \d{{4}}-.*; if node7 is down, delete {tmp_path}/\.lock\)"
    with pytest.raises(ValueError, match=gone), lock(tmp_path):
        pass
    (tmp_path / ".lock.holder").write_text("[")
    with pytest.raises(ValueError, match=f"another run is at work in {tmp_path}; wait"), lock(tmp_path):
        pass
    other.kill()
    other.wait()
    os.kill(child, 0)  # a worker that lives on for a while keeps nobody out
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".b.png.k3x_9zq1.part").write_bytes(b"half")
    (tmp_path / "a" / ".step-0000001.part").mkdir()
    with lock(tmp_path):
        assert [p.name for p in (tmp_path / "a").iterdir()] == [".step-0000001.part"], "what was half-written is gone"
    os.kill(child, signal.SIGKILL)
    with lock(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a"]


@pytest.mark.dist
def test_all_processes_hear_that_a_folder_is_taken(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from accelerate import PartialState; from tim.resumable import locked\n"
        "from tim.distributed import leave_process_group\n"
        "state = PartialState(cpu=True)\n"
        "def say(error):  # in one write, which no other process can come between\n"
        "    os.write(1, f'{state.process_index} {type(error).__name__} {error}\\n'.encode())\n"
        "try:\n    with locked(Path(sys.argv[1]), state): print('ran')\n"
        "except ValueError as error: say(error)\n"
        "from tim.resumable import first_process\n"
        "def fail(): raise OSError('disk full')\n"
        "try: first_process(state, fail)\n"
        "except (OSError, ValueError) as error: say(error)\n"
        "leave_process_group()"
    )
    script = tmp_path / "other.py"
    script.write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)]
    with lock(tmp_path):
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "ran" not in done.stdout
    assert all(f"{rank} ValueError another run is at work in {tmp_path}" in done.stdout for rank in (0, 1)), done.stdout
    assert "0 OSError disk full" in done.stdout and "1 ValueError disk full" in done.stdout, done.stdout


def test_blocks_hold_the_same_items_whatever_is_done():
    def blocks(rank, world):
        state = SimpleNamespace(is_main_process=rank == 0, process_index=rank, num_processes=world)
        return own_blocks(11, 3, lambda k: k in finished, state)

    finished = {0, 1, 2, 5, 9}
    whole = blocks(0, 1)
    assert [(list(b.items), b.missing) for b in whole] == [([3, 4, 5], [3, 4]), ([6, 7, 8], [6, 7, 8]), ([9, 10], [10])]
    for world in (2, 3, 5):
        parts = [block for rank in range(world) for block in blocks(rank, world)]
        assert sorted(parts, key=lambda block: block.missing) == whole


def test_an_error_of_the_first_process_keeps_its_words(tmp_path):
    def fail():
        raise ValueError("taken")

    with pytest.raises(ValueError, match=r"^taken$"):
        first_process(PartialState(), fail)
    with pytest.raises(PermissionError):  # the others would wait for ever if it were not handed on
        first_process(PartialState(), lambda: (_ for _ in ()).throw(PermissionError("read-only")))
    with locked(tmp_path, PartialState()):
        assert first_process(PartialState(), lambda: 3) == 3


def test_what_says_who_holds_a_lock_is_no_way_to_other_files(tmp_path):
    """In a folder of others it may be a pipe, or a link."""
    run, holder = tmp_path / "run", tmp_path / "run" / ".lock.holder"
    run.mkdir()
    (tmp_path / "precious").write_text("mine")
    for make in (lambda: holder.symlink_to(tmp_path / "precious"), lambda: os.mkfifo(holder), holder.mkdir):
        make()
        with lock(run):
            pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_pipes_are_neither_read_nor_written_as_json(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for use in (read_json, lambda path: append_json_lines(path, [{}])):
        with pytest.raises(OSError, match="a folder, a pipe or a device instead of a file"):
            use(tmp_path / "pipe")
    assert read_json_lines(tmp_path / "pipe") == []


@pytest.mark.parametrize("content", ["[]", "3", '{"settings": []}', '{"settings": 3}', "{}", "null", "[" * 100000])
def test_a_record_of_another_form_is_no_claim(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json does not say what .* holds"):
        claim(tmp_path / "run.json", {"a": 1}, "images", key="settings")


def test_brackets_by_the_thousand_are_an_error_like_others():
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    for text in ("[" * 100000, "[" * 100000 + "]" * 100000, "{", b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)
