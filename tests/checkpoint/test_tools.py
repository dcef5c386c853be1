"""Export and inspection of weights: own checkpoints of both formats, published files, and everything damaged."""

import json

import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.commands import command
from helpers.networks import TINY, load_golden, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tim
from tim.checkpoint.weights import find_weights
from tim.files import run_record, sha256
from tim.models.c2i.tim_model import TiM
from tim.models.loading import load_strict, read_state_dict

EXPORT, INSPECT = "tools/export_checkpoint.py", "tools/inspect_checkpoint.py"
CONFIG = """
model:
  transport: {{target: tim.schedulers.transports.OT_FM}}
  transition_loss: {{}}
  network: {{target: tim.models.c2i.tim_model.TiM, params: {params}}}
data: {{data_type: package, dataset: {{name: digits}}}}
training: {{max_train_steps: 5}}
"""


@pytest.fixture(params=["full", "sharded"])
def project(request, tmp_path):
    """A project with two checkpoints of one of the formats."""
    return save_project(tmp_path / "project", sharded=request.param == "sharded")


def save_project(root, sharded=False, with_ema=True):
    (root / "checkpoints").mkdir(parents=True)
    (root / "config.yaml").write_text(CONFIG.format(params={"num_classes": 10, **TINY}))
    for step in (3, 5):
        network, ema = (randomize(TiM(num_classes=10, **TINY), seed) for seed in (step, step + 1))
        optimizer = torch.optim.AdamW(network.parameters())
        save_checkpoint(root / "checkpoints", step, network, ema if with_ema else None, optimizer, {"seed": 0}, sharded=sharded)
    return root


def weights(seed):
    return randomize(TiM(num_classes=10, **TINY), seed).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_export_of_the_newest_checkpoint(project, tmp_path):
    config = project / "config.yaml"
    for kind, seed in (("ema", 6), ("raw", 5)):
        out = tmp_path / f"{kind}.safetensors"
        command(EXPORT, project, out, "--weights", kind, "--config", config)
        assert same(load_file(out), weights(seed))
        with safe_open(out, framework="pt") as f:
            known = f.metadata()
        assert known["step"] == "5" and known["weights"] == kind and known["tim_version"] == tim.__version__
        assert known["config_sha256"] == sha256(config) and known["format"] == "pt"
    command(EXPORT, project / "checkpoints" / "step-0000003", tmp_path / "old.safetensors")
    assert same(load_file(tmp_path / "old.safetensors"), weights(4))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_published_files_become_safetensors(tmp_path, suffix):
    _, _, network = load_golden("c2i_tiny")
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    flat = torch.zeros(100)
    state["module.x_embedder.proj.bias"] = flat[:48]  # a view, as optimisers with flat buffers leave them
    published = tmp_path / f"published{suffix}"
    torch.save({"ema": state, "model": {k: v + 1 for k, v in state.items()}}, published)
    command(EXPORT, published, tmp_path / "new.safetensors")
    got = read_state_dict(tmp_path / "new.safetensors")
    load_strict(network, got, "new")
    assert torch.equal(got["x_embedder.proj.bias"], torch.zeros(48)) and (tmp_path / "new.safetensors").stat().st_size < 1e6
    command(EXPORT, published, tmp_path / "raw.safetensors", "--weights", "raw")
    assert same(load_file(tmp_path / "raw.safetensors"), {k: v + 1 for k, v in got.items()})


def test_mistakes_are_refused(tmp_path):
    project = save_project(tmp_path / "project", with_ema=False)
    taken = tmp_path / "taken.safetensors"
    save_file({"a": torch.zeros(1)}, taken)
    new = tmp_path / "new.safetensors"
    cases = [
        ([project, new, "--weights", "ema"], "has no EMA weights"),
        ([project, taken], "taken.safetensors exists"),
        ([project, tmp_path / "new.pt"], "must end in .safetensors"),
        ([tmp_path / "absent", new], "neither a weights file nor a folder with a checkpoint"),
        ([project, new, "--config", "configs/c2i/digits.yaml"], "belongs to another network"),
    ]
    for arguments, message in cases:
        done = command(EXPORT, *arguments, check=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    file = project / "checkpoints" / "step-0000005" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = command(EXPORT, file.parent, new, check=False)
    assert done.returncode == 2 and "is damaged: model.safetensors has" in done.stderr
    assert not new.exists()


def test_samples_of_a_checkpoint_are_those_of_its_exported_weights(project, tmp_path):
    """Of either format, named after the step; a sharded one is told apart by the digests of its files."""
    command(EXPORT, project, tmp_path / "exported.safetensors")
    pictures, records = [], []
    for name, ckpt in (("step-0000005", project), ("exported", tmp_path / "exported.safetensors")):
        words = ["--config", project / "config.yaml", "--ckpt", ckpt, "--sample-dir", tmp_path / "out"]
        command("projects/sample/sample_c2i_ddp.py", *words, "--num-fid-samples", 3, "--num-steps", 1)
        (folder,) = (p for p in (tmp_path / "out").glob(f"{name}-*") if p.is_dir())
        pictures.append([p.read_bytes() for p in sorted(folder.glob("*.png"))])
        records.append(json.loads(run_record(folder).read_text()))
    assert len(pictures[0]) == 3 and pictures[0] == pictures[1]
    weights = find_weights(project)
    assert records[0]["settings"]["weights_sha256"] == weights.digest() and records[0]["weights"] == str(weights.source)
    if weights.source.is_file():
        assert weights.source.name == "ema.safetensors" and weights.digest() == sha256(weights.source)
    else:
        raw, older = find_weights(project, "raw"), find_weights(project / "checkpoints" / "step-0000003")
        assert weights.source.name == "step-0000005" and len({w.digest() for w in (weights, raw, older)}) == 3


def test_inspection_of_a_project(project):
    one = ["--config", "configs/c2i/digits.yaml"]
    done = command(INSPECT, project, *one)
    parameters = sum(v.numel() for v in weights(0).values())
    for part in (
        "step-0000003: step 3,", "step-0000005: step 5,", "valid", f"{parameters} parameters", "float32", "EMA: yes",
        f"fits: {project / 'config.yaml'}",
    ):  # fmt: skip
        assert part in done.stdout, part
    newest = project / "checkpoints" / "step-0000005"
    name = max((p for p in newest.iterdir() if p.suffix != ".json"), key=lambda p: p.stat().st_size).name
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    done = command(INSPECT, project, *one, check=False)
    assert done.returncode == 1 and f"step 5, {'sharded' if name.startswith('__') else 'full'}, DAMAGED: {name}" in done.stdout
    assert "weights of step-0000003" in done.stdout
    (newest / "manifest.json").unlink()
    done = command(INSPECT, newest, check=False)
    assert done.returncode == 1 and "no readable manifest.json" in done.stdout


def test_inspection_of_files(tmp_path):
    save_file(weights(0), tmp_path / "w.safetensors", {"step": "7", "weights": "ema"})
    (tmp_path / "fits.yaml").write_text(CONFIG.format(params={"num_classes": 10, **TINY}))
    (tmp_path / "wider.yaml").write_text(CONFIG.format(params={"num_classes": 10, **TINY, "hidden_size": 96}))
    configs = ["--config", tmp_path / "wider.yaml", "--config", tmp_path / "fits.yaml"]
    done = command(INSPECT, tmp_path / "w.safetensors", *configs)
    assert "step: 7" in done.stdout and f"fits: {tmp_path}/fits.yaml" in done.stdout and "valid" in done.stdout
    torch.save(weights(0), tmp_path / "w.bin")
    done = command(INSPECT, tmp_path / "w.bin", *configs[:2])
    assert "fits none of 1 configs" in done.stdout and "shapes differ" in done.stdout
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    done = command(INSPECT, tmp_path / "cut.safetensors", *configs, check=False)
    assert done.returncode == 1 and "cut.safetensors is damaged" in done.stdout
    assert command(INSPECT, tmp_path / "absent", check=False).returncode == 2


def test_the_shipped_configs_are_searched(tmp_path):
    network = TiM(input_size=8, in_channels=1, num_classes=10, hidden_size=96, depth=3, num_heads=3, encoder_depth=1, z_dim=8,
                  projector_dim=8, lora_hidden_size=32, qk_norm=True, use_new_embed=True, distance_aware=True)  # fmt: skip
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    (line,) = (line for line in command(INSPECT, tmp_path / "w.safetensors").stdout.splitlines() if line.startswith("fits"))
    assert line.endswith("configs/c2i/digits.yaml")
