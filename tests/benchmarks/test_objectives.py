"""The leaderboard of objectives: equal compute, resumable, and nothing but the objective differs."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from helpers.commands import command
from helpers.paths import ROOT

from tim.benchmarks import objectives
from tim.benchmarks.objectives import NFE, SUBJECTS, compare, digits, forward_units, recipe_config, spread, table
from tim.config import load_config

RECIPES = ROOT / "configs/c2i/objectives"
UNITS = {
    "flow_matching": 3.0,
    "meanflow": 3.25,
    "tim": 4.0,
    "tim_jvp": 3.5,
    "tim_marginal": 4.0,
    "tim_to_data": 3.8,
    "two_point": 3.5,
    "two_point_marginal": 4.0,
    "tim_diffusion_08": 3.4,
    "tim_epsilon_0001": 4.0,
    "guidance_input": 4.4,
}


@pytest.fixture(scope="module")
def subject():
    return digits(40)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_its_price_and_differs_in_the_objective_alone(subject, path):
    config, base = recipe_config(path, subject), load_config(ROOT / "configs/c2i/digits.yaml")
    assert forward_units(config) == pytest.approx(UNITS[path.stem])
    for tree in (mine := asdict(config), theirs := asdict(base)):
        tree["model"].pop("transition_loss")
        tree["model"]["network"]["params"].pop("guidance_input", None)
        for key in ("sample_steps", "log_steps", "tracker", "allow_tf32", "compile"):
            tree["training"].pop(key)
    assert mine == theirs


@pytest.mark.slow
def test_a_board_is_filled_once_and_continued(subject, tmp_path, monkeypatch):
    recipes = [RECIPES / f"{name}.yaml" for name in ("tim", "guidance_input")]
    results = compare(subject, recipes[:1], [0], tmp_path, budget=6)
    assert results["tim"]["steps"] == 6 and results["tim"]["nfe"][1]["accuracy"][0] >= 0
    drawn, draw = [], objectives.draw
    monkeypatch.setattr(objectives, "draw", lambda *args, **settings: drawn.append(settings) or draw(*args, **settings))
    results = compare(subject, recipes, [0], tmp_path, budget=6, scales=[2.0])
    both = ["guidance_input w=2.0", "guidance_input w=2.0 by two evaluations"]
    assert list(results) == ["tim", "tim w=2.0", "guidance_input", *both]
    by_two, by_input = {"cfg_scale": 2.0, "guide_first_step": True}, {"guidance_input": 2.0}
    plain = [{}] * len(NFE)
    asked = [{key: value for key, value in settings.items() if key != "num_steps"} for settings in drawn]
    assert asked == [by_two] * len(NFE) + plain + [by_input] * len(NFE) + [by_two] * len(NFE)
    assert results["guidance_input"]["steps"] == 5, "4.4 evaluations a sample instead of 4"
    board = (tmp_path / "leaderboard.md").read_text()
    assert board.count("| guidance_input w=2.0 |") == 4 and (tmp_path / "leaderboard.png").is_file()
    assert json.loads((tmp_path / "leaderboard.json").read_text())["tim"]["nfe"]["32"].keys() == set(objectives.METRICS)

    monkeypatch.setattr(objectives, "train", None)  # nothing is trained again
    assert compare(subject, recipes, [0], tmp_path, budget=6, scales=[2.0]) == results
    with pytest.raises(ValueError, match="other settings"):
        compare(subject, recipes, [0], tmp_path, budget=7)


def test_a_recipe_replaces_the_whole_objective_of_a_data_set(subject, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"base: {ROOT / subject.config}\nmodel: {{transition_loss: {{derivative_type: jvp, tangent: marginal}}}}\n")
    config = recipe_config(RECIPES / "tim.yaml", replace(subject, config=str(own)))
    assert config.model.transition_loss == recipe_config(RECIPES / "tim.yaml", subject).model.transition_loss


def test_a_recipe_may_have_a_law_of_times_of_its_own(subject, tmp_path):
    own = tmp_path / "wide.yaml"
    own.write_text(f"base: {RECIPES / 'tim.yaml'}\nmodel: {{transport: {{params: {{P_std: 1.6}}}}}}\n")
    config, plain = (
        recipe_config(path, replace(subject, config="configs/t2i/shapes.yaml")) for path in (own, RECIPES / "tim.yaml")
    )
    assert config.model.transport.params == {"P_mean": 0.0, "P_std": 1.6, "sigma_d": 1.0}, (
        "of the data set, but for what it sets"
    )
    assert plain.model.transport.params["P_std"] == 1.2
    assert objectives.made_of(config)["times"] != objectives.made_of(plain)["times"]


def test_a_recipe_that_changes_more_is_refused(subject, tmp_path):
    own = tmp_path / "large.yaml"
    own.write_text(f"base: {RECIPES / 'tim.yaml'}\nmodel: {{network: {{params: {{hidden_size: 192}}}}}}\n")
    with pytest.raises(ValueError, match=r"sets model\.network\.params\.hidden_size"):
        recipe_config(own, subject)


def test_nothing_is_trained_when_one_of_the_recipes_cannot_be_compared(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "train", None)
    own, bad = tmp_path / "tim.yaml", tmp_path / "bad.yaml"
    own.write_text(f"base: {RECIPES / 'tim.yaml'}\n")
    bad.write_text(f"base: {RECIPES / 'tim.yaml'}\nmodel: {{transition_loss: {{tangent: guided}}}}\n")
    other = tmp_path / "out" / "two_point" / "seed-7" / "result.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"made_of": {"objective": {}, "steps": 9, "seed": 7}}))
    for last, match in (
        (own, f"two recipes are called tim; .* {own}"),
        (bad, "tangent='guided'"),
        (RECIPES / "two_point.yaml", "seed-7 holds a result of other settings"),
    ):
        with pytest.raises(ValueError, match=match):
            compare(subject, [RECIPES / "tim.yaml", last], [0], tmp_path / "out", budget=6)
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["result.json"]


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--recipes nope", "no recipe configs/c2i/objectives/nope.yaml; configs/c2i/objectives has flow_matching, "),
        ("--seeds 0 -1", "--seeds must be >= 0, got -1"),
        ("--budget 0", "--budget must be >= 1, got 0"),
        ("--scales 1 nan", "--scales must be finite numbers >= 1, got nan"),
        ("--scales 0.5", "--scales must be finite numbers >= 1, got 0.5"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message, tmp_path):
    program, out = "projects/evaluate/compare_objectives.py", tmp_path / "out"
    done = command(program, "digits", "--out", out, *flags.split(), check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"error: {message}") and not out.exists()


def test_scales_of_guidance_keep_the_seeds_that_measured_them(tmp_path):
    scores = {n: dict.fromkeys(objectives.METRICS, 0.5) for n in NFE}
    for seed, scales in ((0, []), (1, [2.0, 4.0]), (2, [4.0])):
        folder = tmp_path / "tim" / f"seed-{seed}"
        folder.mkdir(parents=True)
        made_of = {"steps": 3, "seed": seed}
        (folder / "result.json").write_text(json.dumps({"made_of": made_of, "seconds": 1.0, "nfe": scores}))
        (folder / "guided.json").write_text(json.dumps({str(scale): scores for scale in scales}))
    results = objectives.read_results(tmp_path, ["tim"])
    assert {name: result["seeds"] for name, result in results.items()} == {
        "tim": [0, 1, 2], "tim w=2.0": [1], "tim w=4.0": [1, 2]
    }  # fmt: skip


def test_real_images_score_best(subject):
    """The judge's own images: no distance, full recall, diversity 1, and half of it for half of the spread."""
    assert spread(subject.real, subject.real_prompts) > 0
    assert spread(subject.real / 2, subject.real_prompts) == pytest.approx(spread(subject.real, subject.real_prompts) / 2)
    assert set(SUBJECTS) == {"digits", "shapes"}
    noise = [torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy() for _ in subject.prompts]
    scores = subject.measure(noise)
    assert scores["frechet_distance"] > 50 and scores["accuracy"] < 0.5


def test_the_table_has_means_and_spreads():
    values = partial(dict.fromkeys, NFE)
    results = {"tim": {"steps": 5, "seconds": 1.6, "seeds": [0, 1], "nfe": values({"accuracy": [0.5, 0.7]})}}
    line = table(results, "accuracy").splitlines()[-1]
    assert line.startswith("| tim | 5 | 2 | 2 |") and line.count("0.600 ± 0.100") == len(NFE)
