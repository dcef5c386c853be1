"""Text is UTF-8 whatever the locale, with or without a byte order mark, and a line of another encoding is named."""

import ast
import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from PIL import Image

from tim.evaluation.dpg.scoring import COLUMNS, read_questions
from tim.files import read_json_lines, read_text, write_json, write_json_lines
from tim.generation.prompt_sets import DPGPrompts, GenEvalPrompts, read_mjhq, read_prompts
from tim.preparation.captioned import read_jsonl

READERS = {
    "prompts.txt": ("ein Löwe\n写真\n", lambda path: read_prompts(str(path)), ["ein Löwe", "写真"]),
    "metadata.jsonl": ('{"prompt": "ein Löwe"}\n', lambda path: GenEvalPrompts(str(path)).prompts, ["ein Löwe"]),
    "dpg.txt": ("ein Löwe", lambda path: DPGPrompts(str(path.parent)).prompts, ["ein Löwe"]),
    "meta.json": ('{"k": {"category": "a", "prompt": "Löwe"}}', read_mjhq, (["a/k"], ["Löwe"])),
    "captions.jsonl": ('{"image_file": "0.png", "caption": "Löwe"}\n', read_jsonl, [("0.png", ["Löwe"])]),
}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_no_part_of_the_text_and_other_encodings_are_named(tmp_path, name):
    text, reader, want = READERS[name]
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert reader(tmp_path / name) == want
    (tmp_path / name).write_text("\n" + text, encoding="latin-1" if "写" not in text else "utf-16")
    with pytest.raises(ValueError, match=rf"{name} line \d"):
        reader(tmp_path / name)


def test_the_line_of_another_encoding_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\ncaf\xe9\r\n")
    with pytest.raises(ValueError, match=r"a\.csv line 3 is not UTF-8 text"):
        read_text(tmp_path / "a.csv")
    (tmp_path / "q.csv").write_text(",".join(COLUMNS) + "\n0,1,0,t,q\n0,1,0,entity (x),caf\xe9?\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"q\.csv line 3 is not UTF-8 text"):
        read_questions(tmp_path / "q.csv")


def test_names_of_files_in_another_encoding_are_written_and_read_again(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_json_lines(tmp_path / "a.jsonl", [{"file": name}, {"file": "é"}])
    write_json(tmp_path / "a.json", name)
    assert read_json_lines(tmp_path / "a.jsonl") == [{"file": name}, {"file": "é"}]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == name


@pytest.mark.parametrize("category,key", [("a", "../../x"), ("..", "x"), ("/a", "x"), ("a", "k" * 300), ("a", "b\0")])
def test_prompts_name_no_files_outside_their_folder(tmp_path, category, key):
    (tmp_path / "meta.json").write_text(json.dumps({key: {"category": category, "prompt": "p"}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"meta\.json: entry .* has no usable category or key"):
        read_mjhq(tmp_path / "meta.json")


def test_a_command_reads_writes_and_prints_the_same_in_the_c_locale(tmp_path):
    source = tmp_path / "captions.jsonl"
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    lines = [{"image_file": "0.png", "caption": "ein Löwe 写真"}, {"image_file": "ü.png", "caption": "fehlt"}]
    source.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    tool = [sys.executable, "tools/build_t2i_buckets.py", source, "--out", tmp_path / "out", "--batch-size", "1"]
    env = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(tool, cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "ü.png cannot be read as an image" in done.stdout.decode()
    assert "ein Löwe 写真" in (tmp_path / "out" / "data_info.jsonl").read_text(encoding="utf-8")


def test_no_text_file_is_opened_in_the_encoding_of_the_locale():
    for path in sorted(p for folder in ("tim", "tools", "projects") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or "encoding" in {keyword.arg for keyword in node.keywords}:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")
            text |= isinstance(node.func, ast.Name) and name == "open" and "b" not in "".join(map(ast.unparse, node.args[1:2]))
            assert not text, f"{path.relative_to(ROOT)} line {node.lineno}: {name} needs encoding='utf-8'"
