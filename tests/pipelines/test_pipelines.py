"""The pipelines: the sampler's pixels, files, arguments, callbacks, memory savers, refusals."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler
from helpers.companions import save_tiny_kl
from helpers.networks import TINY, randomize
from helpers.paths import ROOT
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from tim import rng
from tim.checkpoint.weights import find_weights
from tim.config import load_config
from tim.generation.sampler import load_sampler
from tim.generation.settings import SampleSettings
from tim.pipelines import (
    TiMClassImg2ImgPipeline,
    TiMClassPipeline,
    TiMClassTransformer2DModel,
    TiMImg2ImgPipeline,
    TiMPipeline,
    TiMTransformer2DModel,
    TransitionScheduler,
)
from tim.schedulers.sampling import sample
from tim.schedulers.transports import OT_FM

PROMPTS = ["a red circle", "two dogs under a blue sky"]


def seeds(*numbers):
    """A generator for each."""
    return [torch.Generator().manual_seed(number) for number in numbers]


def arrays(images):
    return np.stack([np.asarray(image) for image in images])


def draw(pipe, prompts, **arguments):
    """Images as an array in [0, 1]."""
    return pipe(prompts, **{"generator": seeds(0)[0], "output_type": "np", **arguments}).images


def sampler_and_noise(run, count, **settings):
    """The sampling commands' own sampler, and the noise of its first images."""
    config, weights = load_config(run / "config.yaml"), find_weights(run / "w.safetensors")
    sampler = load_sampler(config, weights, SampleSettings(num_steps=4, cfg_scale=2.5, **settings), torch.device("cpu"))
    noise = [rng.generator(0, "sample", 0, k).standard_normal(sampler.latent_shape, dtype=np.float32) for k in range(count)]
    return sampler, torch.from_numpy(np.stack(noise))


def test_captions_get_the_pixels_of_the_benchmark_sampler(text_pipe, text_run):
    sampler, noise = sampler_and_noise(text_run, 2, height=16, width=24)
    want, latents = sampler.draw(PROMPTS)
    call = partial(text_pipe, height=16, width=24)
    out = call(PROMPTS, latents=noise)
    assert out.nfe == 7 and np.array_equal(arrays(out.images), want)
    torch.testing.assert_close(call(PROMPTS, latents=noise, output_type="latent").images, latents, rtol=0, atol=0)
    for k, prompt in enumerate(PROMPTS):
        alone = arrays(call(prompt, latents=noise[k : k + 1]).images)
        assert np.array_equal(alone[0], sampler.draw([prompt], [k])[0][0])
        assert np.abs(alone[0].astype(int) - want[k]).max() <= 1  # sums of other batches round differently


def test_classes_get_the_pixels_of_the_benchmark_sampler(class_pipe, class_run):
    sampler, noise = sampler_and_noise(class_run, 3, guidance_high=0.7)
    want, _ = sampler.draw([0, 1, 2])
    out = class_pipe(["nought", "one", 2], latents=noise, guidance_scale=2.5, guidance_high=0.7)
    assert out.nfe == sampler.nfe == 6 and np.array_equal(arrays(out.images), want)
    tensor = class_pipe(torch.tensor([0, 1, 2]), latents=noise, guidance_scale=2.5, guidance_high=0.7, output_type="pt").images
    assert tensor.shape == (3, 1, 8, 8) and np.array_equal((tensor * 255).round().byte().numpy()[:, 0], want[..., 0])


def test_saved_whole_sharded_or_as_a_variant_it_draws_the_same(text_pipe, tmp_path):
    want = draw(text_pipe, PROMPTS)
    text_pipe.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    text_pipe.save_pretrained(tmp_path / "variant", variant="small")
    assert list((tmp_path / "plain" / "transformer").glob("*-of-*.safetensors"))
    for folder, options in (("plain", {}), ("variant", {"variant": "small"})):
        loaded = TiMPipeline.from_pretrained(tmp_path / folder, **options)
        assert np.array_equal(draw(loaded, PROMPTS), want), folder
    half = TiMPipeline.from_pretrained(tmp_path / "plain", torch_dtype=torch.bfloat16)
    assert {m.dtype for m in (half.transformer, half.vae, half.text_encoder)} == {torch.bfloat16}
    assert np.abs(draw(half, PROMPTS) - want).mean() < 0.02
    TiMImg2ImgPipeline.from_pipe(half)  # shares what it is made of, and casts nothing
    kinds = {m.dtype for m in (half.transformer.t_embedder.mlp[0].weight, half.transformer.final_layer.linear.weight)}
    assert kinds == {torch.float32, torch.bfloat16} and half.vae.dtype == torch.bfloat16
    moved = TiMPipeline.from_pretrained(tmp_path / "plain").to(torch.bfloat16)
    assert np.isfinite(draw(moved, PROMPTS)).all()


def test_a_pixel_model_keeps_its_class_names(class_pipe, tmp_path):
    class_pipe.save_pretrained(tmp_path)
    loaded = TiMClassPipeline.from_pretrained(tmp_path)
    assert loaded.vae is None and loaded.labels == {"zero": 0, "nought": 0, "one": 1}
    assert np.array_equal(draw(loaded, "one"), draw(class_pipe, 1))


def test_one_image_does_not_depend_on_its_batch(text_pipe):
    batch = draw(text_pipe, PROMPTS, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), stochasticity_ratio=0.2)
    for k in range(4):
        alone = draw(text_pipe, PROMPTS[k // 2], generator=seeds(k)[0], stochasticity_ratio=0.2)
        np.testing.assert_allclose(batch[k], alone[0], atol=1e-5)
    assert np.abs(batch[0] - batch[1]).max() > 1e-3


def test_captions_can_be_encoded_apart(text_pipe, tmp_path):
    text_pipe.save_pretrained(tmp_path)
    encoder = TiMPipeline.from_pretrained(tmp_path, transformer=None, vae=None)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    embeds = dict(zip(names, encoder.encode_prompt(PROMPTS), strict=True))
    painter = TiMPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert np.array_equal(draw(painter, None, **embeds), draw(text_pipe, PROMPTS))
    with pytest.raises(ValueError, match="no text encoder"):
        painter("a red circle")
    other = draw(text_pipe, PROMPTS, negative_prompt=["a dog", "a small green square"])
    assert np.abs(other - draw(text_pipe, PROMPTS)).max() > 1e-4


def test_visible_padding_is_that_of_the_batch(text_pipe):
    text_pipe.register_to_config(text_padding="batch")
    y, mask, negative, negative_mask = text_pipe.encode_prompt(PROMPTS)
    assert mask is None and negative_mask is None and negative.shape[1] == y.shape[1]
    assert draw(text_pipe, PROMPTS).shape == (2, 16, 16, 3)


def test_guidance_as_an_input_of_the_network(class_pipe):
    params = {**TINY, "in_channels": 1, "num_classes": 3, "guidance_input": True}
    pipe = TiMClassPipeline(randomize(TiMClassTransformer2DModel(**params), scale=0.3), TransitionScheduler())
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    result = pipe([0, 2], latents=noise, guidance_input=3.0, guidance_high=0.9, output_type="latent")
    guidance = torch.tensor([[3.0, 0.0, 0.9]]).expand(2, 3)
    want = sample(OT_FM(), pipe.transformer, noise, {"y": torch.tensor([0, 2]), "guidance": guidance}, num_steps=4)
    assert torch.equal(result.images, want.x.float()) and result.nfe == 4
    assert not torch.allclose(result.images, pipe([0, 2], latents=noise, output_type="latent").images)
    start = TiMClassImg2ImgPipeline.from_pipe(pipe)([0, 2], torch.zeros(1, 1, 8, 8), 1.0, latents=noise, guidance_input=3.0)
    assert np.array_equal(arrays(start.images), arrays(pipe([0, 2], latents=noise, guidance_input=3.0).images))
    with pytest.raises(ValueError, match=r"`guidance_input`=3\.0 needs a network"):
        class_pipe([0], guidance_input=3.0)
    with pytest.raises(ValueError, match="must be >= 1"):
        pipe([0], guidance_input=0.5)


def test_the_flow_map_scheduler_of_diffusers_draws_the_same(text_pipe):
    want = draw(text_pipe, PROMPTS, num_inference_steps=5)
    text_pipe.scheduler = FlowMapEulerDiscreteScheduler()
    np.testing.assert_allclose(draw(text_pipe, PROMPTS, num_inference_steps=5), want, atol=1e-5)


def test_callbacks_see_and_change_the_state_and_may_end_the_run(text_pipe):
    seen = []

    def watch(pipe, step, time, kwargs):
        seen.append((step, time, kwargs["latents"].clone()))
        return kwargs

    want = draw(text_pipe, "a red circle", output_type="latent")
    assert torch.equal(draw(text_pipe, "a red circle", output_type="latent", callback_on_step_end=watch), want)
    assert [(step, time) for step, time, _ in seen] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]

    def stop(pipe, step, time, kwargs):
        pipe._interrupt = step == 1

    stopped = draw(text_pipe, "a red circle", output_type="latent", callback_on_step_end=stop)
    assert torch.equal(stopped, seen[1][2].float())

    def blank(pipe, step, time, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else None

    assert draw(text_pipe, "a red circle", output_type="latent", callback_on_step_end=blank).abs().max() == 0


def test_times_of_ones_own_and_the_guidance_window(text_pipe):
    assert text_pipe("a", timesteps=[1.0, 0.7, 0.2], guide_first_step=True).nfe == 6
    assert text_pipe("a", num_inference_steps=8, guidance_low=0.2, guidance_high=0.6).nfe == 8 + 3
    default, same = (draw(text_pipe, "a", **how) for how in ({}, {"timesteps": [1.0, 0.75, 0.5, 0.25, 0.0]}))
    assert np.array_equal(default, same)


def test_models_that_wait_elsewhere_draw_the_same(text_pipe):
    want = draw(text_pipe, PROMPTS)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            text_pipe.enable_model_cpu_offload()
    text_pipe.enable_model_cpu_offload(device="cuda" if torch.cuda.is_available() else "cpu")
    np.testing.assert_allclose(draw(text_pipe, PROMPTS), want, atol=1e-3 if torch.cuda.is_available() else 1e-6)
    text_pipe.remove_all_hooks()
    text_pipe.to("cpu")
    cpu = torch.device("cpu")
    text_pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    np.testing.assert_allclose(draw(text_pipe, PROMPTS), want, atol=1e-6)


def test_tiles(text_pipe, class_pipe):
    text_pipe.enable_vae_tiling()
    assert text_pipe.vae.use_tiling
    text_pipe.disable_vae_tiling()
    assert not text_pipe.vae.use_tiling
    with pytest.raises(ValueError, match="needs an autoencoder"):
        class_pipe.enable_vae_tiling()


def test_pictures_to_start_from(text_pipe):
    pipe = TiMImg2ImgPipeline(**text_pipe.components)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.fromarray(np.full((20, 24, 3), grey, np.uint8)) for grey in (40, 220)]
    out = pipe(PROMPTS, pictures, strength=0.5, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    assert out.images[0].size == (24, 20) and len(out.images) == 4 and out.nfe == 8  # below T_max the first step is guided
    alone = pipe(PROMPTS[1], pictures[1], strength=0.5, generator=seeds(3)[0])
    assert np.abs(arrays(alone.images)[0].astype(int) - arrays(out.images)[3]).max() <= 1
    whole = draw(pipe, PROMPTS, image=pictures, strength=1.0, height=16, width=16)
    assert np.array_equal(whole, draw(text_pipe, PROMPTS))  # all of the picture is noised away
    clean = pipe.vae.encode(torch.full((1, 3, 16, 16), 2 * 40 / 255 - 1)).latent * pipe.vae.config.scaling_factor
    torch.nn.init.zeros_(pipe.transformer.final_layer.linear.weight)  # and the bias: a network that leaves the state alone
    torch.nn.init.zeros_(pipe.transformer.final_layer.linear.bias)
    noise, call = torch.randn(1, 8, 4, 4), {"image": pictures[0], "height": 16, "width": 16, "output_type": "latent"}
    start = draw(pipe, "a", latents=noise, strength=0.3, **call)
    torch.testing.assert_close(start, 0.7 * clean + 0.3 * noise, rtol=1e-4, atol=1e-4)
    assert pipe("a", pictures[0], timesteps=[0.6, 0.3], guidance_scale=1.0).nfe == 2
    for arguments, match in (
        ({"image": pictures[0], "strength": 0.0}, "`strength`.*0.0"),
        ({"image": None}, "`image` is missing"),
        ({"image": [*pictures, pictures[0]]}, "one or 2 pictures"),
        ({"image": pictures[0], "num_inference_steps": 0}, "`num_inference_steps`.*0"),
        ({"image": pictures[0], "timesteps": [0.0]}, "decreasing"),
    ):
        with pytest.raises(ValueError, match=match):
            pipe(PROMPTS, **arguments)


def test_classes_start_from_pictures_too(class_pipe):
    pipe = TiMClassImg2ImgPipeline.from_pipe(class_pipe)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.full((8, 8), 200, np.uint8))
    whole = draw(pipe, ["nought", 2], image=picture, strength=1.0, generator=seeds(0, 1))
    assert np.array_equal(whole, draw(class_pipe, ["nought", 2], generator=seeds(0, 1)))  # all of the picture is noised away
    torch.nn.init.zeros_(pipe.transformer.final_layer.linear.weight)  # and the bias: a network that leaves the state alone
    torch.nn.init.zeros_(pipe.transformer.final_layer.linear.bias)
    noise = torch.randn(1, 1, 8, 8)
    start = draw(pipe, 1, image=picture, latents=noise, strength=0.3, output_type="latent")
    torch.testing.assert_close(start, 0.7 * (2 * 200 / 255 - 1) + 0.3 * noise, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`strength`.*1\.5"):
        pipe(1, picture, strength=1.5)
    with pytest.raises(ValueError, match="`image` must have 1 channels but has 3"):
        pipe(1, torch.zeros(1, 3, 8, 8))


def test_pictures_through_a_posterior(text_pipe, tmp_path):
    """SD-VAE's kind encodes to a distribution, whose sample is the generator's."""
    save_tiny_kl(tmp_path)
    network = randomize(TiMTransformer2DModel(cap_feat_dim=20, **TINY), scale=0.3)
    parts = {**text_pipe.components, "transformer": network, "vae": AutoencoderKL.from_pretrained(tmp_path)}
    pipe = TiMImg2ImgPipeline(**parts)
    picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    one, two = (draw(pipe, "a", image=picture) for _ in range(2))
    assert one.shape == (1, 64, 64, 3) and np.array_equal(one, two)


@pytest.mark.parametrize(
    "arguments,match",
    [
        ({"prompt": None}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": []}, "at least one string"),
        ({"prompt": ["a", 3]}, "3, a int"),
        ({"num_inference_steps": 0}, "`num_inference_steps`.* >= 1 but is 0"),
        ({"num_inference_steps": 2.5}, r"`num_inference_steps`.*2\.5"),
        ({"guidance_scale": 0.5}, r"`guidance_scale`.* >= 1 .*0\.5"),
        ({"guidance_low": 0.6, "guidance_high": 0.5}, "`guidance_low`.*`guidance_high`"),
        ({"height": 18}, "`height`.*multiple of 4 but is 18.*16 and 20"),
        ({"generator": seeds(0, 1)}, "list of 2, but 1 image"),
        ({"latents": torch.zeros(1, 8, 4, 5)}, r"\(1, 8, 4, 4\).*\(1, 8, 4, 5\)"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"output_type": "jpg"}, "`output_type`.*pil.*'jpg'"),
        ({"timesteps": [0.2, 0.5]}, "decreasing"),
        ({"stochasticity_ratio": -1.0}, "stochasticity_ratio"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt`.*one or 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "latents, but has noise"),
        ({"max_sequence_length": 2}, "no room for text"),
    ],
)
def test_what_it_refuses(text_pipe, arguments, match):
    with pytest.raises(ValueError, match=match):
        text_pipe(**{"prompt": "a", **arguments})


def test_classes_it_does_not_have(class_pipe, text_pipe):
    for label, match in ((3, "0 to 2"), (-1, "0 to 2"), ("two", "'two'.*zero"), ([], "empty")):
        with pytest.raises(ValueError, match=match):
            class_pipe(label)
    with pytest.raises(ValueError, match="without num_classes"):
        TiMClassPipeline(text_pipe.transformer, text_pipe.scheduler, text_pipe.vae)
    with pytest.raises(ValueError, match=r"8 channels.*1"):
        TiMClassPipeline(class_pipe.transformer, class_pipe.scheduler, text_pipe.vae)


def test_folders_it_refuses(text_pipe, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        TiMPipeline.from_pretrained(tmp_path / "nowhere")
    text_pipe.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    (tmp_path / "p" / "model_index.json").write_text(json.dumps({**index, "vae": ["os", "system"]}))
    with pytest.raises(ValueError, match="vae from 'os'"):
        TiMPipeline.from_pretrained(tmp_path / "p")
    (tmp_path / "p" / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(tmp_path / "p" / "vae")
    with pytest.raises(OSError, match=r"config\.json"):
        TiMPipeline.from_pretrained(tmp_path / "p")


def test_the_card_that_goes_to_the_hub(class_pipe, tmp_path, monkeypatch):
    metrics = {"nfe": {"1": {"frechet_distance": 12.5, "images": 10, "weights_sha256": "ab"}}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    class_pipe.save_pretrained(tmp_path / "p", metrics=tmp_path / "metrics.json")
    (tmp_path / "other.json").write_text('{"loss": 1.0}')
    for name, error in (("nowhere.json", FileNotFoundError), ("other.json", ValueError)):
        with pytest.raises(error, match=name):
            class_pipe.save_pretrained(tmp_path / "q", metrics=tmp_path / name)
    assert not (tmp_path / "q").exists()
    cards = [ModelCard.load(tmp_path / "p" / "README.md")]

    import diffusers.utils.hub_utils as hub

    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(hub, "load_or_create_model_card", lambda *_, **__: ModelCard("---\ntags: [mine]\n---\nMine."))
    monkeypatch.setattr(hub, "upload_folder", lambda folder_path, **_: cards.append(ModelCard.load(folder_path + "/README.md")))
    TiMClassPipeline.from_pretrained(tmp_path / "p").push_to_hub("me/digits")
    text = "---\n---\nThis model card has been automatically generated."
    monkeypatch.setattr(hub, "load_or_create_model_card", lambda *_, **__: ModelCard(text))
    TiMClassPipeline.from_pretrained(tmp_path / "p").push_to_hub("me/digits")
    for card in cards:
        assert (card.data.library_name, card.data.license) == ("diffusers", "apache-2.0") and card.data.pipeline_tag
    saved, kept, replaced = cards
    assert kept.text.strip() == "Mine." and kept.data.tags == ["mine"]
    assert "| 1 | 12.5 | 10 |" in saved.text and "TiMClassPipeline" in replaced.text and replaced.text == saved.text


def test_a_hub_id_is_read_whole_from_its_snapshot(class_pipe, tmp_path, monkeypatch):
    class_pipe.save_pretrained(tmp_path)
    asked = {}
    monkeypatch.setattr(
        "tim.pipelines.base.snapshot_download", lambda name, **how: asked.update(how, name=name) or str(tmp_path)
    )
    loaded = TiMClassPipeline.from_pretrained("me/digits", revision="v1")
    assert np.array_equal(draw(loaded, 1), draw(class_pipe, 1))
    assert asked["name"] == "me/digits" and asked["revision"] == "v1" and not [p for p in asked["allow_patterns"] if "bin" in p]


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    config = ROOT / "configs/c2i/digits.yaml"
    save_file(randomize(load_config(config).model.network.build()).state_dict(), tmp_path / "w.safetensors")
    page = page.replace('"workdir/quickstart"', '"w.safetensors"').replace("configs/c2i/digits.yaml", str(config))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = [{} for _ in blocks]
    for block, name in zip(blocks, names, strict=True):
        exec(block, name)
    assert [image.size for image in names[0]["result"].images] == [(8, 8)] * 4 and names[1]["x"].isfinite().all()
