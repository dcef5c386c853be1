"""The suite of benchmarks measures what it can within its time, and loses nothing."""

import json
import pickle
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from helpers import measurements as m
from helpers.commands import command
from helpers.paths import ROOT

from tim.benchmarks import cases, report, suite, variants
from tim.benchmarks.isolation import Case
from tim.benchmarks.report import TABLES
from tim.benchmarks.suite import run_suite


def case(name, run, clean=None, seconds=60.0, **keywords):
    return Case("training", name, run, keywords, clean, seconds)


def test_what_fails_dies_or_hangs_is_a_line_and_the_rest_is_measured(tmp_path):
    wanted = [
        case("first", m.succeed, value=1),
        case("fails", m.fail),
        case("second", m.succeed, value=2),
        case("spoils", m.fail, clean=m.spoilt),
        case("third", m.succeed, value=3),
        case("dies", m.die),
        case("hangs", m.hang, seconds=0.3),
        case("fourth", m.succeed, value=4),
    ]
    seen = []
    records = {r["name"]: r for r in run_suite(wanted, tmp_path, 1, True, lambda rows: seen.append(len(rows)))}
    assert [records[name]["value"] for name in ("first", "second", "third", "fourth")] == [1, 2, 3, 4]
    assert records["fails"]["error"] == records["spoils"]["error"] == "ValueError: too large"
    assert "code 7" in records["dies"]["error"] and "stopped after" in records["hangs"]["error"]
    assert records["first"]["pid"] == records["second"]["pid"] != records["third"]["pid"] != records["fourth"]["pid"]
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8] and list(records) == [c.name for c in wanted]


def test_a_cut_keeps_what_is_measured_and_another_run_measures_the_rest(tmp_path, monkeypatch):
    measured, clock = [], [0.0]
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def a_minute(value):
        measured.append(value)
        clock[0] += 60
        return {"value": value}

    wanted = [case(value, a_minute, value=value) for value in "abcd"]
    wanted[1] = case("b", m.fail)
    cut = run_suite(wanted, tmp_path, 1.5, False, lambda rows: None)
    assert measured == ["a", "c"] and cut[1]["error"] == "ValueError: too large" and "no time" in cut[3]["error"]
    assert json.loads((tmp_path / "results.json").read_text()) == cut
    wanted[1] = case("b", a_minute, value="b")
    assert [r["value"] for r in run_suite(wanted, tmp_path, 10, False, lambda rows: None)] == list("abcd")
    assert measured == ["a", "c", "b", "d"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The suite on this machine, compiled for Python alone; without the cases of Inception, which have a test of their own."""
    out = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "compile_blocks", partial(variants.compile_blocks, backend="eager"))
        patch.setattr(cases, "adm_case", lambda *_, **__: cases.tangent_cases([(8, 1)], heads=1, head_dim=8)[0])
        done = command("tools/bench.py", "suite", "--out", out)
    return out, done.stdout


def test_the_suite_on_a_cpu_measures_each_case_or_says_why_not(measured):
    out, printed = measured
    records = json.loads((out / "results.json").read_text())
    failed = {r["name"]: r["error"] for r in records if "error" in r}
    assert all("triton" in name and "'triton'" in error for name, error in failed.items()), failed
    assert {r["group"] for r in records} == {"machine", "training", "attention", "precision", "sampling"}
    table = (out / "results.md").read_text()
    assert all(r["name"] in table and r["name"] in printed for r in records) and (out / "results.png").stat().st_size > 10_000
    steps = {r["name"]: r for r in records if r["group"] == "training" and "error" not in r}
    assert {r["compiled"] for r in steps.values()} == {True, False} and all(r["kernels"] > 100 for r in steps.values())
    dde, jvp, flow = (
        steps[f"digits, batch 8, {kind}"]["model_tflop_per_step"] for kind in ("dde", "jvp explicit", "flow matching")
    )
    assert flow < jvp < dde and (jvp - flow) / (dde - flow) < 0.55
    errors = {r["name"]: r["relative_error"] for r in records if r["group"] == "precision" and "error" not in r}
    assert errors["digits jvp float32"] < 1e-3 < errors["digits jvp bfloat16 explicit"] < 0.05 < errors["digits dde bfloat16"]


def test_what_was_not_measured_has_no_panel(measured):
    records = json.loads((measured[0] / "results.json").read_text())
    titles = [axes.get_title() for axes in report.plot(records).axes]
    assert len(titles) == 3 and titles[1:] == ["Sampling, an image", "Attention's tangent alone"]
    of_training = [r for r in records if r["group"] in ("machine", "training")]
    assert [axes.get_title() for axes in report.plot(of_training).axes] == titles[:1]
    assert not report.plot([{"group": "training", "name": "a", "error": "no time was left"}]).axes


def test_cases_of_a_gpu_reach_another_process():
    wanted = cases.all_cases(on_gpu=True)
    there = pickle.loads(pickle.dumps(wanted))
    assert there == wanted and len({c.name for c in there}) == len(there)
    assert {c.group for c in there} == set(TABLES) and there[0].group == "machine"
    for model in {c.keywords["model"] for c in there if "model" in c.keywords}:
        assert model.load().training.mixed_precision == "bf16", model  # one process has one precision for all runs


def test_results_of_another_machine_are_not_mixed(measured, tmp_path):
    records = json.loads((measured[0] / "results.json").read_text())
    records[0]["device"] = "another GPU"
    (tmp_path / "results.json").write_text(json.dumps(records))
    before = (tmp_path / "results.json").read_bytes()
    done = command("tools/bench.py", "suite", "--out", tmp_path, check=False)
    assert done.returncode == 2 and "another GPU" in done.stderr and "--out" in done.stderr
    assert (tmp_path / "results.json").read_bytes() == before


def test_steps_are_watched_for_waits_from_the_second_on(monkeypatch):
    modes = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    assert cases.measure_waiting(cases.DIGITS, variants.Variant("jvp")) == {"waits": 0}
    assert modes == ["error"] * 4 + ["default"]


def test_the_script_names_what_python_lacks(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -I -S "$@"\n')  # without installed packages
    bare.chmod(0o755)
    for flags, told in (((), "lacks torch, "), (("--minute", "3"), "unknown argument --minute"), (("--out",), "--out needs")):
        run = ["bash", ROOT / "scripts/bench_gpu.sh", *flags]
        done = subprocess.run(run, env={"PATH": "/usr/bin:/bin", "PYTHON": str(bare)}, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout and done.stderr.startswith("error: ") and told in done.stderr
