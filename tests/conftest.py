"""Fixtures the tests share: golden numbers, tiny models, command runners."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing folder is an error at once, not a search on a hub

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
TINY = dict(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=48,
    depth=2,
    num_heads=3,
    encoder_depth=1,
    z_dim=12,
    projector_dim=16,
    qk_norm=True,
    use_new_embed=True,
    distance_aware=True,
    lora_hidden_size=16,
)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def load_golden(name: str):
    """(meta, tensors, network with the golden weights) of c2i_tiny or t2i_tiny."""
    from tim.models.c2i.tim_model import TiM as C2I
    from tim.models.t2i.tim_model import TiM as T2I

    meta = json.loads((GOLDENS / name / "meta.json").read_text())
    network = {"c2i": C2I, "t2i": T2I}[meta["kind"]](**meta["network"])
    network.load_state_dict(load_file(GOLDENS / name / "weights.safetensors"), strict=True)
    return meta, load_file(GOLDENS / name / "tensors.safetensors"), network


def randomize(network: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Fill every parameter with small normals, so that gates and output are not zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float32) * scale)
    return network


def save_tiny_kl(folder, **kwargs):
    """A random AutoencoderKL of SD-VAE's kind (4 channels, /8) in the diffusers format; returns it."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        **kwargs,
    )
    model.save_pretrained(folder)
    return model.eval()


def save_tiny_text_encoder(folder, width=20):
    """A random BertModel with a tokenizer trained on a few captions, in the transformers format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a photo of a red circle", "two dogs under a blue sky", "a small green square"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast), hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=300,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)


def save_tiny_dc(folder, **kwargs):
    """A random AutoencoderDC of DC-AE's kind (/4, 8 channels) in the diffusers format; returns it."""
    from diffusers import AutoencoderDC

    model = AutoencoderDC(
        latent_channels=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        attention_head_dim=8,
        **kwargs,
    )
    model.save_pretrained(folder)
    return model.eval()


def save_captioned_images(root, count=30, sizes=((16, 16), (12, 20), (20, 12))):
    """Crops of two photographs with captions, in three buckets; batches of 3 and 4."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    (root / "images").mkdir(parents=True)
    lines, members = [], {size: [] for size in sizes}
    for k in range(count):
        height, width = size = sizes[k % 3]
        crop = pictures[k % 2][5 * k : 5 * k + 4 * height, 7 * k : 7 * k + 4 * width]
        Image.fromarray(crop).save(root / "images" / f"{k}.png")
        captions = [f"a photo number {k}", "a flower" if k % 2 else "a temple", "a"]
        lines.append({"image_file": f"{k}.png", "bucket": f"set-{height}x{width}", "captions": captions})
        members[size].append(k)
    (root / "data_info.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    packed = [m[i : i + 4] for m in members.values() for i in range(0, len(m), 4)]
    (root / "bucket_sampler.json").write_text(json.dumps(packed))


def command(*args: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """Run a project entry point: by torchrun for several processes, else inside this one, which saves the imports."""
    words = list(map(str, args))
    if processes > 1:
        head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*head, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    else:
        done = run_inside(words)
    if check and done.returncode:
        raise AssertionError(f"{args} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def start_and_kill(words: list, ready: Callable[[], bool]) -> None:
    """Start a command in a process of its own and kill -9 it as soon as `ready`; it must not have ended before."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not ready():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"


def logged_steps(project: Path) -> int:
    """Lines of a training run's log.jsonl."""
    log = project / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def run_inside(words: list[str]) -> subprocess.CompletedProcess:
    """Run a script as __main__ in this process, from the repository root, and catch what it prints and returns."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, folder = sys.argv, os.getcwd()
    sys.argv = words
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
        os.chdir(folder)
        reset_accelerate()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def reset_accelerate() -> None:
    """Forget the mixed precision of the last Accelerator."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def fresh_state():
    """Seed torch; let each test choose its own mixed precision."""
    torch.manual_seed(0)
    yield
    reset_accelerate()


@pytest.fixture
def one_thread():
    """As many threads as `command` gives each of several processes: sums are split in the same way, to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["c2i_tiny", "t2i_tiny"])
def golden(request):
    return load_golden(request.param)


@pytest.fixture
def tiny_c2i():
    from tim.models.c2i.tim_model import TiM

    return randomize(TiM(num_classes=10, **TINY))


@pytest.fixture
def tiny_t2i():
    from tim.models.t2i.tim_model import TiM

    return randomize(TiM(cap_feat_dim=20, **TINY))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A .pth with seeded random weights of the real Inception."""
    from inception_weights import save_random_inception

    return save_random_inception(tmp_path_factory.mktemp("inception") / "inception.pth")
