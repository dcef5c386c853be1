"""Sharded training (FSDP2) against whole copies (DDP), any number of processes against one, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.captioned import save_captioned_images
from helpers.companions import save_tiny_text_encoder
from helpers.networks import TINY
from helpers.paths import ROOT

from tim.config import ConfigError, load_config
from tim.training.loop import train
from tim.training.sharding import sharding_plugin
from tim.training.tasks import ClassTask

DIGITS = ROOT / "configs/c2i/digits.yaml"
WORKER = ROOT / "tests/helpers/sharding_worker.py"
SMALL = [
    "model.network.params.hidden_size=24", "model.network.params.depth=2", "training.sample_steps=null",
    "training.dtype=float64",
]  # fmt: skip
FEW = [*SMALL, "training.max_train_steps=3", "data.dataloader.batch_size=4", "training.gradient_accumulation_steps=2"]
GUIDED = ["model.transport.params.enhance_target=true", "model.transport.params.w_cond=0.75"]
LOPSIDED = ["data.dataloader.batch_size=1", "training.gradient_accumulation_steps=1"]  # r = t on rank 0, not on rank 1
CASES = {
    "dde": [],
    "jvp": ["model.transition_loss.derivative_type=jvp", "training.max_grad_norm=0.01"],
    "recomputed": ["model.network.params.use_checkpoint=true", "training.sample_steps=2"],
    "lopsided": LOPSIDED,
    "lopsided_jvp": [*LOPSIDED, "model.transition_loss.derivative_type=jvp"],
    "half": ["training.mixed_precision=bf16", "training.dtype=float32"],
    "compiled": [*GUIDED, "model.transition_loss.guidance_path=guided", "training.compile=true"],
    "marginal": [
        "model.transition_loss.derivative_type=jvp", "model.transition_loss.tangent=marginal",
        "data.dataloader.batch_size=1", "training.gradient_accumulation_steps=1",
    ],
    "two_point": [
        "model.transition_loss.derivative_type=two_point", "model.transition_loss.two_point_ratio=[1.0, 0.1]",
        "data.dataloader.batch_size=1", "training.gradient_accumulation_steps=1",
    ],
    "guidance_input": [*LOPSIDED, "model.transition_loss.guidance_max=4.0", "model.network.params.guidance_input=true"],
    "t2i": [],
}  # fmt: skip
SPLITS = {  # processes, samples per process and micro-batch, accumulation: one global batch of 32
    "one": (1, 32, 1),
    "one_accumulated": (1, 8, 4),
    "two": (2, 16, 1),
    "two_accumulated": (2, 8, 2),
    "two_sharded": (2, 4, 4),
    "four_sharded": (4, 8, 1),
    "four_accumulated": (4, 4, 2),
}
SPLIT_JVP = {f"jvp_{name}": SPLITS[name] for name in ("one", "two_accumulated", "two_sharded", "four_accumulated")}


def launch(runs: dict, folder: Path, processes: int, head: list[str]) -> None:
    """Train the runs in `processes` processes, started by the command `head`."""
    folder.mkdir(exist_ok=True)
    plan = folder / f"runs{processes}.json"
    plan.write_text(json.dumps({name: [str(config), options] for name, (config, options) in runs.items()}))
    words = [sys.executable, "-m", *head, str(WORKER), str(plan), str(folder)]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def accelerate_launch(kind: str, processes: int) -> list[str]:
    file = str(ROOT / f"configs/accelerate/{kind}.yaml")
    port = ["--main_process_port", "0"]  # any free one
    return ["accelerate.commands.accelerate_cli", "launch", "--config_file", file, "--num_processes", str(processes), *port]


def losses(folder: Path, name: str) -> list[float]:
    return [json.loads(line)["denoising_loss"] for line in (folder / name / "log.jsonl").read_text().splitlines()]


def split_run(name: str) -> tuple[Path, list[str]]:
    _, batch, accumulation = (SPLITS | SPLIT_JVP)[name]
    options = [f"data.dataloader.batch_size={batch}", f"training.gradient_accumulation_steps={accumulation}"]
    sharded = ["training.fsdp_config={}"] if name.endswith("sharded") else []
    return DIGITS, [
        *SMALL,
        "model.use_dir_loss=false",
        "model.network.params.depth=1",
        f"training.max_train_steps={12 if name in SPLITS else 6}",
        f"model.transition_loss.derivative_type={'dde' if name in SPLITS else 'jvp'}",
        *options,
        *sharded,
    ]


@pytest.fixture(scope="module")
def t2i_config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("t2i")
    save_captioned_images(root / "data")
    save_tiny_text_encoder(root / "text")
    tree = yaml.safe_load((ROOT / "configs/t2i/tim_xl_p1_t2i.yaml").read_text())
    tree["model"].update(vae_dir=None, enc_dir=None, text_encoder_dir=str(root / "text"))
    shape = {"input_size": 16, "patch_size": 4, "in_channels": 3, "cap_feat_dim": 20, "rope_grid": "row_major"}
    tree["model"]["network"]["params"] = {**TINY, **shape}
    files = {"root_dir": "data/images", "jsonl_dir": "data/data_info.jsonl", "packed_json": "data/bucket_sampler.json"}
    dataset = {key: str(root / path) for key, path in files.items()}
    tree["data"] = {"data_type": "image_ms", "dataset": dataset, "dataloader": {"num_workers": 0, "batch_size": 4}}
    tree["training"].update(mixed_precision="no", log_steps=1)
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, t2i_config) -> Path:
    """Every case with whole copies in ddp/ and sharded in fsdp2/, each started by `accelerate launch` with its file alone."""
    folder = tmp_path_factory.mktemp("pairs")
    runs = {name: (DIGITS, [*FEW, *options]) for name, options in CASES.items()} | {"t2i": (t2i_config, FEW[2:])}
    two = {name: split_run(name) for name, (processes, _, _) in (SPLITS | SPLIT_JVP).items() if processes == 2}
    sharded = {name: run for name, run in two.items() if name.endswith("sharded")}
    whole = {name: run for name, run in two.items() if name not in sharded}
    launch(runs | whole, folder / "ddp", 2, accelerate_launch("ddp", 2))
    runs["recomputed"][1].append("training.fsdp_config={sharding_strategy: SHARD_GRAD_OP}")
    launch(runs | sharded, folder / "fsdp2", 2, accelerate_launch("fsdp2", 2))
    return folder


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_sharded_training_is_training(pairs, name):
    """Losses, gradients and moving averages of three steps are those of DDP: to 1e-9 in float64, to 1e-5 under bfloat16."""
    tolerance = 1e-5 if name == "half" else 1e-9
    whole, sharded = load(pairs / "ddp", name), load(pairs / "fsdp2", name)
    assert losses(pairs / "fsdp2", name) == pytest.approx(losses(pairs / "ddp", name), rel=tolerance)
    for kind in ("gradients", "ema"):
        assert len(whole[kind]) == len(sharded[kind]) == 3
        for a, b in zip(whole[kind], sharded[kind], strict=True):
            assert a.keys() == b.keys()
            largest = max(v.abs().max() for v in a.values())
            assert max((a[k] - b[k]).abs().max() for k in a) <= tolerance * largest


@pytest.mark.slow
@pytest.mark.dist
def test_the_moving_average_follows_shard_by_shard_with_the_same_bits(pairs):
    for name in CASES:
        assert load(pairs / "fsdp2", name)["same_bits"] == [True] * 3, name


@pytest.mark.slow
@pytest.mark.dist
def test_no_process_holds_all_weights_between_steps(pairs):
    for name in CASES:
        assert load(pairs / "ddp", name)["share"] == [1.0] * 3
        assert all(0.49 < share < 0.52 for share in load(pairs / "fsdp2", name)["share"]), name


@pytest.mark.slow
@pytest.mark.dist
def test_every_process_helps_to_draw_the_previews(pairs):
    folders = [pairs / kind / "recomputed" / "samples" for kind in ("ddp", "fsdp2")]
    pictures = [{p.name: p.read_bytes() for p in folder.glob("*.png")} for folder in folders]
    assert pictures[0] == pictures[1] and [*sorted(pictures[0])] == [f"step-000000{k}.png" for k in (0, 2, 3)]


@pytest.mark.slow
@pytest.mark.dist
def test_process_count_and_accumulation_do_not_change_the_losses(pairs, tmp_path):
    """One global batch of 32 split seven ways over 1, 2 and 4 processes: 12 losses equal to 1e-9 in float64.

    And 6 losses of the exact derivative, which rides in the wrapped network's pass, split four ways.
    """
    many = {name: split_run(name) for name, (processes, _, _) in (SPLITS | SPLIT_JVP).items() if processes == 4}
    launch(many, tmp_path, 4, ["torch.distributed.run", "--standalone", "--nproc_per_node", "4"])
    for name in ("one", "one_accumulated", "jvp_one"):
        config, options = split_run(name)
        train(load_config(config, options), tmp_path / name, 1, ClassTask)
    for first, steps, splits in (("one", 12, SPLITS), ("jvp_one", 6, SPLIT_JVP)):
        want = losses(tmp_path, first)
        assert len(want) == steps and len(set(want)) == steps
        for name, (processes, _, _) in splits.items():
            folder = tmp_path if processes != 2 else pairs / ("fsdp2" if name.endswith("sharded") else "ddp")
            assert losses(folder, name) == pytest.approx(want, rel=1e-9), name
    assert losses(tmp_path, "one")[1:6] != losses(tmp_path, "jvp_one")[1:]


@pytest.mark.parametrize(
    "value,match",
    [
        ("{reshard_after_forwards: true}", "fsdp_config.reshard_after_forwards; did you mean 'reshard_after_forward'"),
        ("{fsdp_version: 1}", "fsdp_version=1 is not supported"),
        ("{sharding_strategy: HYBRID}", "sharding_strategy='HYBRID' is not one of FULL_SHARD, SHARD_GRAD_OP"),
        ("{sharding_strategy: [FULL_SHARD]}", "sharding_strategy=\\['FULL_SHARD'\\] is not one of"),
        ("{transformer_cls_names_to_wrap: 7}", "must be a list of class names, got 7"),
        ("{reshard_after_forward: 2}", "reshard_after_forward must be true or false"),
        ("{mixed_precision_policy: bf16}", r"training\.mixed_precision says"),
        ("{cpu_offload: true}", "cpu_offload"),
        ("{auto_wrap_policy: SIZE_BASED_WRAP, min_num_params: 5}", "SIZE_BASED_WRAP"),
        ("{auto_wrap_policy: sometimes}", "sometimes"),
    ],
)
@pytest.mark.filterwarnings("ignore:no effect under FSDP2")
def test_settings_that_cannot_be_honoured_are_refused(value, match):
    with pytest.raises(ValueError, match=match):
        sharding_plugin(load_config(DIGITS, [f"training.fsdp_config={value}"]).training.fsdp_config)


def test_keywords_of_the_first_fsdp_are_named_and_ignored():
    with pytest.warns(UserWarning, match="backward_prefetch, use_orig_params"):
        plugin = sharding_plugin(
            {"use_orig_params": True, "backward_prefetch": "BACKWARD_PRE", "sharding_strategy": "FULL_SHARD"}
        )
    assert plugin.reshard_after_forward is True and plugin.fsdp_version == 2
    assert sharding_plugin({"sharding_strategy": "SHARD_GRAD_OP"}).reshard_after_forward is False
    assert sharding_plugin(None) is None


def test_accelerate_launch_with_the_first_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="set fsdp_version: 2"):
        sharding_plugin(None)


def test_one_process_says_that_it_shards_nothing(tmp_path):
    with pytest.warns(UserWarning, match="no effect with one process"):
        train(load_config(DIGITS, [*FEW, "training.fsdp_config={}", "training.max_train_steps=1"]), tmp_path, 1, ClassTask)
    assert len(losses(tmp_path.parent, tmp_path.name)) == 1


def test_unknown_keys_are_refused_when_the_file_is_read():
    with pytest.raises(ConfigError, match=r"unknown key training\.fsdp_config\.a"):
        load_config(DIGITS, ["training.fsdp_config={a: 1}"])
