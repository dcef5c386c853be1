"""Training adapters: what is trained and kept, resumed exactly, and drawn with by the sampler and by pipelines."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import command
from helpers.networks import TINY, randomize
from helpers.paths import ROOT
from helpers.processes import killed_at, log_of, losses, run, state_of, train
from PIL import Image
from safetensors.torch import load_file, save_file

from tim.checkpoint.adapters import LORA_FILE
from tim.config import Lora, load_config, to_yaml
from tim.files import sha256
from tim.models.adapters import add_adapters, is_adapter_key
from tim.models.network import build_network
from tim.pipelines import TiMClassPipeline, TiMClassTransformer2DModel, TransitionScheduler
from tim.pipelines.convert import to_lora, to_pipeline
from tim.training.ema import EMA

DIGITS = ROOT / "configs/c2i/digits.yaml"
SMALL = [
    "model.network.params.hidden_size=24", "model.network.params.depth=1", "training.sample_steps=null",
    "training.dtype=float64", "training.max_train_steps=5", "training.checkpointing_steps=2", "data.dataloader.batch_size=16",
    "model.transition_loss.derivative_type=jvp", "model.transport.params.enhance_target=true", "model.use_dir_loss=false",
    "training.learning_rate=0.05", "training.lr_scheduler=constant", "training.lr_warmup_steps=0", "model.ema_decay=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base, the config of adapters on it, and `run`, trained with it."""
    root = tmp_path_factory.mktemp("lora")
    config = load_config(DIGITS, SMALL)
    base = randomize(build_network(config.model.network), scale=0.1).state_dict()
    save_file({k: v for k, v in base.items() if not k.startswith("projector.")}, root / "base.safetensors")
    lora = {"rank": 3, "alpha": 6.0, "use_dora": True}
    tree = {"base": str(DIGITS), "model": {"ckpt": str(root / "base.safetensors"), "lora": lora}}
    (root / "lora.yaml").write_text(yaml.safe_dump(tree))
    (root / "config.yaml").write_text(to_yaml(config))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(root / "lora.yaml", root / "run", SMALL)
    torch.set_num_threads(threads)
    return root


def test_adapters_alone_are_trained_and_kept(project):
    step = project / "run/checkpoints/step-0000005"
    parts = [load_file(step / f"{name}.safetensors") for name in ("model", "ema")]
    optimizer = torch.load(step / "optimizer.pt", weights_only=True)
    for keys in (*parts, optimizer["state"]):
        assert len(keys) == 15 and all(map(is_adapter_key, keys)), "A, B and magnitude of five layers"
    assert all(v.any() for k, v in parts[0].items() if "lora_B" in k) and not torch.equal(*(p.popitem()[1] for p in parts))
    settings = json.loads((step / "state.json").read_text())["settings"]
    assert settings["base_sha256"] == sha256(project / "base.safetensors") and settings["lora.rank"] == 3
    assert sum(p.stat().st_size for p in step.iterdir()) < (project / "base.safetensors").stat().st_size


def test_the_average_shares_what_is_not_trained(tiny_c2i):
    add_adapters(tiny_c2i, Lora(rank=2))
    ema = EMA(tiny_c2i, 0.5, share=True)
    mine, theirs = dict(ema.network.named_parameters()), dict(tiny_c2i.named_parameters())
    assert {key for key in mine if mine[key] is not theirs[key]} == set(filter(is_adapter_key, mine))
    key = "blocks.0.attn.qkv.lora_B.default.weight"
    torch.nn.init.ones_(theirs[key])
    ema.update(tiny_c2i, torch.zeros(()))
    assert torch.equal(mine[key], 0.5 * theirs[key])


@pytest.mark.dist
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_exactly_also_as_two(project, tmp_path):
    log, cut = tmp_path / "log", tmp_path / "cut"
    assert run(train, project / "lora.yaml", cut, SMALL, "ClassTask", killed_at(3), log=log) == [-signal.SIGKILL]
    shutil.copytree(cut, tmp_path / "two")
    train(project / "lora.yaml", cut, SMALL)
    assert state_of(cut, 5) == state_of(project / "run", 5) and losses(cut) == losses(project / "run")
    assert run(train, project / "lora.yaml", tmp_path / "two", SMALL, ranks=2, log=log) == [0, 0]
    assert [r["step"] for r in log_of(tmp_path / "two")] == [1, 2, 3, 4, 5]
    assert losses(tmp_path / "two") == pytest.approx(losses(project / "run"), rel=1e-9)


def test_pipelines_load_scale_fuse_and_unload_adapters(project, tmp_path):
    """The adapters that the run left give the merged pipeline's picture, to 1e-5; unloaded, the base has its own bits."""
    to_pipeline(project / "run", tmp_path / "merged")
    to_pipeline(project / "base.safetensors", tmp_path / "base")
    merged, pipe = (TiMClassPipeline.from_pretrained(tmp_path / name) for name in ("merged", "base"))

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(3, latents=torch.full((1, 1, 8, 8), 0.5), output_type="latent").images

    want, before, plain = draw(merged), draw(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(project / "run", adapter_name="digits")
    with pytest.raises(ValueError, match="'digits' is taken"):
        pipe.load_lora_weights(project / "run", adapter_name="digits")
    torch.testing.assert_close(draw(pipe), want, rtol=1e-5, atol=1e-5)
    assert (want - before).abs().max() > 1e-3
    other = {k: v[:, :1] if "lora_B" in k else v for k, v in load_file(project / "run" / LORA_FILE).items()}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj has no A and B of one rank"):
        pipe.load_lora_weights(other)
    with pytest.raises(ValueError, match="adapters are loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.set_adapters("digits", 0.5)
    assert (draw(pipe) - before).abs().max() > 1e-4 and (draw(pipe) - want).abs().max() > 1e-4
    pipe.set_adapters("digits")
    pipe.unload_lora_weights()
    assert all(torch.equal(v, plain[k]) for k, v in pipe.transformer.state_dict().items()) and torch.equal(draw(pipe), before)
    pipe.load_lora_weights(to_lora(project / "run", tmp_path / "ema", kind="ema"))
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), want, rtol=1e-5, atol=1e-5)
    pipe.unfuse_lora()
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe), before, rtol=1e-5, atol=1e-5)


def test_adapters_of_another_network_leave_a_pipeline_as_it_was(project, tmp_path):
    pipe = TiMClassPipeline(TiMClassTransformer2DModel(num_classes=10, **TINY), TransitionScheduler())
    state = load_file(project / "run" / LORA_FILE)
    keys = pipe.transformer.state_dict().keys()
    with pytest.raises(ValueError, match=r"no adapters of this network: .*takes 24 inputs, the layer 48"):
        pipe.load_lora_weights(project / "run")
    with pytest.raises(ValueError, match=r"transformer\.other.*belongs to no layer"):
        pipe.load_lora_weights({k.replace("blocks.0", "other"): v for k, v in state.items()})
    torch.save({}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"w\.bin is damaged or no safetensors file"):
        pipe.load_lora_weights(tmp_path / "w.bin")
    with pytest.raises(OSError, match="nowhere"):
        pipe.load_lora_weights(tmp_path / "nowhere")
    assert pipe.transformer.state_dict().keys() == keys


def test_the_sampler_puts_adapters_on_their_base(project, tmp_path):
    """The picture is that of the merged weights, up to a rounding; a base that is another, or gone, is named."""
    words = ["projects/sample/sample_c2i_ddp.py", "--num-fid-samples", "1", "--num-steps", "2", "--sample-dir", tmp_path]
    adapted = [*words, "--config", project / "run/config.yaml", "--ckpt", project / "run", "--name"]
    command(*adapted, "adapters")
    merged = TiMClassTransformer2DModel.from_single_file(project / "run", project / "run/config.yaml")
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    command(*words, "--config", project / "config.yaml", "--ckpt", tmp_path / "merged.safetensors", "--name", "merged")
    command(*words, "--config", project / "config.yaml", "--ckpt", project / "base.safetensors", "--name", "base")
    first, second, base = (np.asarray(Image.open(tmp_path / n / "000000.png"), int) for n in ("adapters", "merged", "base"))
    assert np.abs(first - second).max() <= 1 < np.abs(first - base).max()
    moved = shutil.copytree(project / "run", tmp_path / "run")
    text = (moved / "config.yaml").read_text()
    for name, match in (
        ("gone.safetensors", "model.ckpt"),
        ("merged.safetensors", "adapts other weights than those of"),
    ):
        (moved / "config.yaml").write_text(text.replace(str(project / "base.safetensors"), str(tmp_path / name)))
        done = command(*words, "--config", moved / "config.yaml", "--ckpt", moved, "--name", "other", check=False)
        assert done.returncode == 2 and done.stderr.count("error: ") == 1 and match in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "overrides,match",
    [
        (["model.ckpt=null"], r"model\.lora adapts trained weights: name them by model\.ckpt"),
        (["model.ckpt_allow_missing=['projector.*']"], r"model\.ckpt_allow_missing has no place beside model\.lora"),
        (["model.lora.ranks=3"], r"unknown key model\.lora\.ranks; did you mean 'rank'"),
        (["model.lora.rank=0"], r"model\.lora\.rank must be > 0"),
        (["model.lora.init_lora_weights=pissa"], r"init_lora_weights='pissa' is not one of True, gaussian, orthogonal"),
        (["model.lora.target_modules=[qvk]"], r"model\.lora\.target_modules: the network has no 'qvk'; did you mean 'qkv'"),
        (["model.network.params.hidden_size=48"], "belongs to another network than the config's"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(project, tmp_path, overrides, match):
    with pytest.raises(ValueError, match=match):
        train(project / "lora.yaml", tmp_path / "new", [*SMALL, *overrides])
    assert not (tmp_path / "new").exists()


def test_other_adapters_or_another_base_do_not_go_on(project, tmp_path):
    copied = shutil.copytree(project / "run", tmp_path / "run")
    more = [*SMALL, "training.max_train_steps=6"]
    with pytest.raises(ValueError, match=r"lora\.alpha 6\.0, now 3\.0"):
        train(project / "lora.yaml", copied, [*more, "model.lora.alpha=3.0"])
    save_file({k: v + 1 for k, v in load_file(project / "base.safetensors").items()}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="base_sha256"):
        train(project / "lora.yaml", copied, [*more, f"model.ckpt={tmp_path / 'base.safetensors'}"])


def test_parts_that_are_trained_whole_are_merged_but_no_adapters(project, tmp_path, capsys):
    own = [*SMALL, "model.lora.modules_to_save=[final_layer.linear]", "training.max_train_steps=1", "model.use_ema=false"]
    own.append("model.transport.params.enhance_target=false")
    train(project / "lora.yaml", tmp_path / "run", own)
    assert not (tmp_path / "run" / LORA_FILE).exists() and "were trained whole" in capsys.readouterr().err
    network = to_pipeline(tmp_path / "run", tmp_path / "pipeline").transformer
    trained = load_file(tmp_path / "run/checkpoints/step-0000001/model.safetensors")
    key = "final_layer.linear.modules_to_save.default.weight"
    assert torch.equal(network.final_layer.linear.weight, trained[key].float())
    with pytest.raises(ValueError, match="were trained whole"):
        to_lora(tmp_path / "run", tmp_path / "adapters")
