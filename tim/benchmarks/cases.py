"""What the suite measures, the most valuable first: one function and its keywords for every line of its tables."""

import gc
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tim.benchmarks.derivative import DerivativePrecision, bench_tangent
from tim.benchmarks.evaluation import bench_adm
from tim.benchmarks.flops import network_flops
from tim.benchmarks.isolation import Case
from tim.benchmarks.measure import Results, copy_bandwidth, machine, matmul_rate, synchronize
from tim.benchmarks.sampling import bench_sample, random_sampler
from tim.benchmarks.suite import MACHINE
from tim.benchmarks.training import random_run, time_steps, watch
from tim.benchmarks.variants import Variant, end_variants
from tim.config import Config, load_config
from tim.distributed import best_device, set_tf32
from tim.generation.sampler import Sampler
from tim.generation.settings import SampleSettings
from tim.models.network import build_network
from tim.training.setup import Run

FORMS = ("flash", "triton", "explicit")
TOKENS = 64  # of a caption


@dataclass(frozen=True)
class Model:
    """A configuration that is measured, and as what.

    Args:
        batch_size: of a training step.
    """

    label: str
    config: str
    overrides: tuple[str, ...] = ()
    batch_size: int = 1

    def load(self) -> Config:
        """The configuration."""
        return load_config(self.config, self.overrides)


XL = Model("XL/2-256", "configs/c2i/tim_xl_p2_256.yaml", batch_size=64)
B4 = Model("B/4", "configs/c2i/tim_b_p4.yaml", batch_size=256)
T2I = Model("T2I", "configs/t2i/tim_xl_p1_t2i.yaml")
T2I_512 = Model("T2I 512px", T2I.config, batch_size=64)
T2I_1024 = Model("T2I 1024px", T2I.config, ("model.network.params.input_size=32",), batch_size=16)
TINY = ("depth=1", "hidden_size=48", "num_heads=3", "encoder_depth=1", "lora_hidden_size=16", "input_size=4", "projector_dim=8")
TINY_T2I = Model("tiny T2I", T2I.config, tuple(f"model.network.params.{word}" for word in TINY), batch_size=4)
DIGITS = Model(
    "digits", "configs/c2i/digits.yaml", ("training.mixed_precision=bf16", "model.network.params.depth=1"), batch_size=8
)


def all_cases(on_gpu: bool) -> list[Case]:
    """The cases of a machine."""
    return [replace(case, clean=recover) for case in (gpu_cases() if on_gpu else cpu_cases())]


def gpu_cases() -> list[Case]:
    """For a GPU with 80 GB, in the order in which one would ask."""
    dde, compiled_dde, compiled_jvp = Variant("dde"), Variant("dde", compiled=True), Variant("jvp", compiled=True)
    by_form = [Variant("jvp", form=form) for form in FORMS]
    others = [Variant("dde", "bfloat16"), Variant("none")]
    compiled_forms = [Variant("jvp", form=form, compiled=True) for form in FORMS]
    drawn = {"num_steps": 4, "cfg_scale": 2.5}
    half = {**drawn, "vae_dtype": "bfloat16", "channels_last_vae": True}
    at_1024, at_2048, at_4096 = ({"height": side, "width": side} for side in (1024, 2048, 4096))
    return [
        Case(MACHINE, "machine", measure_machine),
        *training_cases(XL, [dde, *by_form, *compiled_forms[:2], compiled_dde, *others]),
        *waiting_cases(XL, [Variant("jvp"), compiled_jvp]),
        *(sampling_case(T2I, n, drawn | at_1024) for n in (1, 8)),
        *(sampling_case(T2I, n, half | at_1024, compiled=True) for n in (1, 8)),
        *tangent_cases([(256, 32), (1024, 8), (4096, 2)], heads=16, head_dim=72),
        *training_cases(T2I_512, [dde, Variant("jvp"), compiled_jvp]),
        sampling_case(XL, 128, {"num_steps": 250}, compiled=True),
        *precision_cases(B4),
        *training_cases(B4, [dde, Variant("jvp"), compiled_jvp]),
        adm_case(2000, side=256, batch_size=64, workers=8),
        *training_cases(T2I_1024, [dde, Variant("jvp"), compiled_jvp]),
        *training_cases(XL, [Variant("dde", "bfloat16", compiled=True), compiled_forms[2], Variant("none", compiled=True)]),
        sampling_case(T2I, 1, drawn | at_2048),
        sampling_case(T2I, 1, half | at_4096 | {"tile_vae": 1024}),
    ]


def cpu_cases() -> list[Case]:
    """The same on tiny networks: to see that all works, not to measure."""
    variants = [Variant("dde"), *(Variant("jvp", form=form) for form in FORMS), Variant("jvp", compiled=True), Variant("none")]
    return [
        Case(MACHINE, "machine", measure_machine),
        *training_cases(DIGITS, variants, steps=2, warmup=1),
        *training_cases(TINY_T2I, [Variant("jvp")], steps=2, warmup=1),
        *tangent_cases([(16, 2), (64, 1)], heads=3, head_dim=16),
        *precision_cases(DIGITS),
        sampling_case(DIGITS, 8, {"num_steps": 4}, repeats=2),
        adm_case(4, side=32, batch_size=2, workers=0),
    ]


def training_cases(model: Model, variants: Sequence[Variant], steps: int = 10, warmup: int = 3) -> list[Case]:
    """Steps of a model by each variant."""
    keywords = {"model": model, "steps": steps, "warmup": warmup}
    names = {variant: f"{model.label}, batch {model.batch_size}, {variant}" for variant in variants}
    return [
        Case("training", names[v], measure_training, {**keywords, "variant": v}, seconds=240 if v.compiled else 150)
        for v in variants
    ]


def waiting_cases(model: Model, variants: Sequence[Variant]) -> list[Case]:
    """Whether steps of a model by each variant wait for the GPU."""
    return [Case("waiting", f"{model.label}, {v}", measure_waiting, {"model": model, "variant": v}) for v in variants]


def sampling_case(model: Model, batch_size: int, settings: dict[str, Any], compiled: bool = False, repeats: int = 3) -> Case:
    """Sampling by settings of `SampleSettings`. Many steps are timed once."""
    many = settings["num_steps"] > 50
    words = [f"{model.label}, batch {batch_size}, {settings['num_steps']} steps"]
    words += [f"cfg {settings['cfg_scale']}"] if "cfg_scale" in settings else []
    words += [f"{settings['height']}²"] if "height" in settings else []
    words += ["bf16 decoder"] if "vae_dtype" in settings else []
    words += [f"tiles of {settings['tile_vae']}"] if "tile_vae" in settings else []
    words += ["compiled"] if compiled else []
    keywords = {"model": model, "batch_size": batch_size, "settings": tuple(settings.items()), "compiled": compiled}
    keywords |= {"repeats": 1, "warmup": 0} if many else {"repeats": repeats, "warmup": 1}
    return Case("sampling", ", ".join(words), measure_sampling, keywords)


def tangent_cases(sizes: Sequence[tuple[int, int]], heads: int, head_dim: int) -> list[Case]:
    """Attention's tangent by each form, for (tokens, batch size)."""
    keywords = {"heads": heads, "head_dim": head_dim}
    return [
        Case("attention", f"{n} tokens, {form}", measure_tangent, {"tokens": n, "batch_size": b, "form": form, **keywords})
        for n, b in sizes
        for form in FORMS
    ]


def precision_cases(model: Model) -> list[Case]:
    """Errors of dF/dt by each derivative."""
    kinds = [("dde", "float32", None), ("dde", "bfloat16", None), ("jvp", "float32", None)]
    keywords = ("kind", "dtype", "form")
    return [
        Case(
            "precision",
            " ".join((model.label, *filter(None, kind))),
            measure_error,
            {"model": model, **dict(zip(keywords, kind, strict=True))},
        )
        for kind in [*kinds, *(("jvp", "bfloat16", form) for form in FORMS)]
    ]


def adm_case(images: int, **keywords: int) -> Case:
    """Features of the ADM suite."""
    return Case("adm", f"{images} images", bench_adm, {"inception": None, "images": images, **keywords})


def measure_machine() -> Results:
    """What the device can do at best."""
    device = best_device()
    set_tf32(True)
    rates = {f"{dtype}_tflops".removeprefix("torch."): matmul_rate(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    return {**machine(device), "date": time.strftime("%Y-%m-%d %H:%M"), **rates, "copy_gb_per_second": copy_bandwidth(device)}


def measure_training(model: Model, variant: Variant, steps: int, warmup: int) -> Results:
    """Steps of the trainer by a variant, beside the operations that the mathematics needs, whatever a form adds to them."""
    run = run_of(model)
    parts = flops_of(model)
    flops = parts["forward"] + parts["backward"] + parts.get(variant.derivative, 0)
    try:
        variant.apply(run)
        results = time_steps(run, flops, steps, warmup)
        return {**results, "compiled": variant.compiled, "kernels": count_kernels(lambda: watch(run, 1))}
    finally:
        end_variants()


def measure_waiting(model: Model, variant: Variant) -> Results:
    """Steps of the trainer while waiting for the GPU is an error; the first one, which makes its memory, may wait."""
    run = run_of(model)
    try:
        variant.apply(run)
        watch(run, 4, after_step=lambda: torch.cuda.set_sync_debug_mode("error"))
        return {"waits": 0}
    finally:
        torch.cuda.set_sync_debug_mode("default")
        end_variants()


def measure_sampling(
    model: Model, batch_size: int, settings: tuple[tuple[str, Any], ...], compiled: bool, repeats: int, warmup: int
) -> Results:
    """Phases of sampling. Models stay loaded while only size and batch change."""
    wanted, config = SampleSettings(**dict(settings)), model.load()
    config.training.compile = compiled
    loaded = (model, compiled, wanted.vae_dtype, wanted.channels_last_vae, wanted.tile_vae)
    sampler: Sampler = kept(loaded, lambda: random_sampler(config, wanted, best_device(), TOKENS))
    return bench_sample(config, sampler.at(wanted), batch_size, repeats, warmup)


def measure_tangent(**keywords: Any) -> Results:
    """Attention's tangent alone."""
    return bench_tangent(best_device(), **keywords)


def measure_error(model: Model, kind: str, dtype: str, form: str | None) -> Results:
    """How exact a derivative is for 8 samples."""
    precision: DerivativePrecision = kept(("precision", model), lambda: DerivativePrecision(model.load(), best_device(), 8))
    return {"relative_error": precision.error(kind, dtype, form)}


def count_kernels(run: Callable[[], Any]) -> int:
    """Kernels that a call launches on a GPU; operators on a CPU."""
    device = best_device()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return sum(event.device_type == kind for event in profiler.events())


@cache
def flops_of(model: Model) -> dict[str, int]:
    """Operations of the parts of a step without REPA."""
    config = model.load()
    config.model.enc_dir = None
    with torch.device("meta"):
        return network_flops(config, build_network(config.model.network), model.batch_size, TOKENS)


def run_of(model: Model) -> Run:
    """The model's run of the trainer."""

    def build() -> tuple[Run, Any]:
        folder = tempfile.TemporaryDirectory()
        return random_run(model.load(), model.batch_size, Path(folder.name)), folder  # which lasts as long as the run

    return kept(model, build)[0]


_kept: dict[Hashable, Any] = {}


def kept(key: Hashable, build: Callable[[], Any]) -> Any:
    """What `build` returns, kept until a case asks for something else: large models take long to make."""
    if key not in _kept:
        forget()
        _kept[key] = build()
    return _kept[key]


def forget() -> None:
    """Free what is kept."""
    _kept.clear()
    torch.compiler.reset()
    recover()


def recover() -> None:
    """Free what a case left behind; fails when the device is of no more use."""
    gc.collect()
    synchronize(best_device())
    torch.cuda.empty_cache()
