"""The YAML schema: what loads, what is refused and how it says so."""

import pytest
import yaml
from helpers.commands import command
from helpers.paths import ROOT

from tim.config import ConfigError, load_config, parse_config, to_yaml

DIGITS = ROOT / "configs" / "c2i" / "digits.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[ct]2i/*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load_and_print_themselves(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


LATENTS_256 = "datasets/imagenet1k/sd-vae-ft-ema-256x256"
LATENTS_512 = "datasets/imagenet1k/dc-ae-f32c32-sana-1.1-diffusers-512x512"


@pytest.mark.parametrize(
    "name,latent_dir,checkpoint_list,num_workers",
    [
        ("tim_b_p4", LATENTS_256, [100000, 200000, 300000], 16),
        ("tim_xl_p2_256", LATENTS_256, [100000, 250000, 500000], 4),
        ("tim_xl_p2_256_mg", LATENTS_256, [100000, 250000, 500000], 4),
        ("tim_xl_p1_512", LATENTS_512, [100000, 250000, 500000], 4),
        ("tim_xl_p1_512_mg", LATENTS_512, [100000, 250000, 500000], 4),
    ],
)
def test_published_class_conditional_values(name, latent_dir, checkpoint_list, num_workers):
    config = load_config(ROOT / f"configs/c2i/{name}.yaml")
    dataset, training = config.data.dataset, config.training
    assert (dataset.latent_dir, dataset.image_dir) == (latent_dir, "datasets/imagenet1k/images/train")
    assert (training.checkpointing_steps, training.checkpoint_list) == (2000, checkpoint_list)
    assert config.data.dataloader.num_workers == num_workers
    assert config.model.enc_dir == "checkpoints/radio/radio-v2.5-b_half.pth.tar"


def test_published_text_to_image_values():
    config = load_config(ROOT / "configs/t2i/tim_xl_p1_t2i.yaml")
    dataset, training = config.data.dataset, config.training
    assert dataset.root_dir == "datasets/t2i_toy_dataset"
    assert dataset.packed_json == "datasets/t2i_toy_dataset/bucket_sampler.json"
    assert dataset.jsonl_dir == "datasets/t2i_toy_dataset/data_info.jsonl"
    assert (training.checkpointing_steps, training.checkpoint_list) == (1000, [100000, 200000, 300000, 400000])
    assert config.data.dataloader.num_workers == 4
    assert config.model.enc_dir == "checkpoints/radio/radio-v2.5-b_half.pth.tar"


@pytest.mark.parametrize("name", ["c2i/tim_b_p4", "t2i/tim_xl_p1_t2i"])
def test_plus_is_the_published_model_with_the_recipe_that_was_compared(name):
    plus, published = (load_config(ROOT / f"configs/{name}{end}.yaml") for end in ("_plus", ""))
    recipe = load_config(ROOT / "configs/c2i/objectives/tim_marginal.yaml")
    tuned = {
        key: value for key, value in plus.model.transition_loss.items() if published.model.transition_loss.get(key) != value
    }
    assert tuned and tuned.items() <= recipe.model.transition_loss.items()
    plus.model.transition_loss = published.model.transition_loss
    assert plus == published


@pytest.mark.parametrize("prepared,trained", [("imagenet_256_sd_vae", "tim_b_p4"), ("imagenet_512_dc_ae", "tim_xl_p1_512")])
def test_preprocessing_writes_where_training_reads(prepared, trained):
    settings = yaml.safe_load((ROOT / f"configs/preprocess/{prepared}.yaml").read_text())
    dataset = load_config(ROOT / f"configs/c2i/{trained}.yaml").data.dataset
    assert (settings["latent_dir"], settings["image_dir"]) == (dataset.latent_dir, dataset.image_dir)


def test_overrides():
    config = load_config(DIGITS, ["training.max_train_steps=7", "model.network.params.depth=2", "training.learning_rate=3e-4"])
    assert config.training.max_train_steps == 7
    assert config.model.network.build().blocks[1] is not None
    assert config.training.learning_rate == 3e-4


@pytest.mark.parametrize(
    "override,match",
    [
        ("training.max_train_step=7", r"training\.max_train_step; did you mean 'max_train_steps'"),
        ("trainning.max_train_steps=7", r"unknown key trainning; did you mean 'training'"),
        ("training.max_train_steps=many", r"training\.max_train_steps must be int, got 'many'"),
        ("training.max_train_steps=0", r"training\.max_train_steps must be > 0, got 0"),
        ("training.allow_tf32=1", r"training\.allow_tf32 must be bool"),
        ("training.mixed_precision=fp8", r"training\.mixed_precision='fp8' is not one of no, fp16, bf16"),
        ("training.checkpoint_list=[1,x]", r"training\.checkpoint_list\[1\] must be int"),
        ("model.network.params.hiden_size=8", r"model\.network\.params\.hiden_size; did you mean 'hidden_size'"),
        ("model.network.params.num_clases=8", r"did you mean 'num_classes'"),
        ("model.network.params.depth=deep", r"model\.network\.params\.depth must be int"),
        ("model.network.target=tim.models.c2i.tim_model.Tim", r"model\.network\.target='tim.models.c2i.tim_model.Tim' cannot"),
        ("model.transport.params.P_men=1", r"model\.transport\.params\.P_men; did you mean 'P_mean'"),
        ("model.transport.params.w_condition=1", r"did you mean 'w_cond'"),
        ("model.transition_loss.weight_time_typ=sqrt", r"did you mean 'weight_time_type'"),
        ("model.transition_loss.diffusion_ratio=2.0", "diffusion_ratio=2.0"),
        ("model.ema_decay=1.5", r"model\.ema_decay must be <= 1, got 1.5"),
        ("training.optimizer.params.beta=[0.9,0.95]", r"did you mean 'betas'"),
        ("data.dataloader.batch_size=-4", r"data\.dataloader\.batch_size must be > 0, got -4"),
        ("data.data_type=latents", r"data\.data_type='latents'"),
        ("nonsense", r"'nonsense' is not of the form a\.b=c"),
    ],
)
def test_mistakes_name_the_key_and_the_fix(override, match):
    with pytest.raises(ConfigError, match=match):
        load_config(DIGITS, [override])


def test_keys_the_reference_never_reads_warn():
    with pytest.warns(UserWarning, match=r"training\.validation_steps has no effect"):
        load_config(DIGITS, ["training.validation_steps=100"])


def test_missing_sections_files_and_broken_yaml(tmp_path):
    tree = yaml.safe_load(DIGITS.read_text())
    del tree["model"]["network"]
    with pytest.raises(ConfigError, match=r"model\.network is missing"):
        parse_config(tree)
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("model: [1,\n  2: {")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "list.yaml")


@pytest.mark.parametrize("name", ["VP_SDE", "VE_SDE"])
def test_sde_transports_reject_the_ends_they_name_otherwise(name):
    tree = yaml.safe_load(DIGITS.read_text())
    tree["model"]["transport"] = {"target": f"tim.schedulers.transports.{name}", "params": {"T_max": 1.0}}
    with pytest.raises(ConfigError, match="T_max"):
        parse_config(tree)


def test_a_base_is_inherited_key_by_key(tmp_path):
    """Over several files in several folders; --print-config shows the merged result."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text(DIGITS.read_text())
    (tmp_path / "sub" / "b.yaml").write_text(
        "base: ../a.yaml\nmodel: {network: {params: {depth: 2}}}\ntraining: {log_steps: 7}\n"
    )
    (tmp_path / "c.yaml").write_text("base: sub/b.yaml\ntraining: {log_steps: 9}\n")
    want = load_config(DIGITS, ["model.network.params.depth=2", "training.log_steps=9", "training.max_train_steps=3"])
    assert load_config(tmp_path / "c.yaml", ["training.max_train_steps=3"]) == want
    printed = command("projects/train/trainer_c2i.py", "--config", tmp_path / "c.yaml", "--project_dir", "x", "--print-config")
    assert parse_config(yaml.safe_load(printed.stdout)) == load_config(tmp_path / "c.yaml") and "base:" not in printed.stdout


def test_params_go_with_their_target(tmp_path):
    (tmp_path / "own.yaml").write_text(
        f"base: {DIGITS}\nmodel: {{transport: {{target: tim.schedulers.transports.TrigFlow, params: {{sigma_d: 0.5}}}}}}\n"
    )
    assert load_config(tmp_path / "own.yaml").model.transport.params == {"sigma_d": 0.5}


def test_a_base_in_a_circle_and_an_absent_one_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"base leads back to it: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: absent.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml, which is the base of .*b\.yaml"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["tim_xl_p2_256", "tim_xl_p1_512"])
def test_model_guidance_differs_from_its_base_in_the_transport_alone(name):
    base, guided = (load_config(ROOT / f"configs/c2i/{name}{suffix}.yaml") for suffix in ("", "_mg"))
    base.model.transport.params |= {"enhance_target": True, "w_gt": 1.0, "w_cond": 0.75, "w_start": 0.3, "w_end": 0.8}
    assert to_yaml(guided) == to_yaml(base)


@pytest.mark.parametrize(
    "override,match",
    [
        ("data.data_type=null", r"data\.data_type is missing"),
        ("data.dataset.target=helpers.own.Waves", r"data\.dataset\.target replaces data\.data_type"),
        ("data={dataset: {target: absent.Waves}}", r"data\.dataset\.target='absent\.Waves' .* --allow-code absent "),
        ("data={dataset: {target: tim.rng.normals}}", r"data\.dataset\.target='tim\.rng\.normals' is no class"),
        (
            "data={dataset: {target: tim.data.c2i.PackageDataset, params: {nam: digits}}}",
            r"data\.dataset\.params\.nam; did you mean 'name'",
        ),
    ],
)
def test_own_datasets_are_checked_like_other_targets(override, match):
    tree = yaml.safe_load(DIGITS.read_text())
    own = yaml.safe_load(override.partition("=")[2]) if override.startswith("data={") else None
    with pytest.raises(ConfigError, match=match):
        parse_config({**tree, "data": own}) if own else load_config(DIGITS, [override])
