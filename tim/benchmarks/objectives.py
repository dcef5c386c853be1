"""Objectives compared at equal compute: the same network, data and optimiser, and as many network evaluations for each.

An evaluation of a sample without gradient counts 1, one with its backward pass 3, a tangent carried along 1 more. Every recipe
is trained by the trainer for as many steps as the budget buys, with several seeds, drawn by the sampler and judged.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tim import rng
from tim.benchmarks.measure import conditions
from tim.checkpoint.weights import find_weights
from tim.config import Config, load_config, parse_config
from tim.data.c2i import PackageDataset
from tim.data.registry import build_t2i_dataset
from tim.demo.digits import DigitJudge
from tim.demo.retrieval import image_features
from tim.demo.shapes import score
from tim.distributed import best_device
from tim.evaluation.features import grey_digit
from tim.evaluation.metrics import frechet_distance, precision_recall, statistics
from tim.files import read_json, replacing, write_json, write_text
from tim.generation.sampler import Sampler, load_sampler
from tim.generation.settings import SampleSettings
from tim.images import to_uint8
from tim.models.autoencoders import pixels_per_token
from tim.models.network import build_network, traits_of
from tim.targets import Target
from tim.training.loop import train
from tim.training.tasks import CaptionTask, ClassTask
from tim.typed_yaml import flatten, read_tree

BASE = "configs/c2i/digits.yaml"  # of all recipes
PUBLISHED = "configs/c2i/objectives/tim.yaml"  # whose steps are the budget
INPUT = "model.network.params.guidance_input"
TIMES = ("model.transport.params.P_mean", "model.transport.params.P_std")  # the law by which times are drawn
NFE = (1, 2, 4, 8, 32)
METRICS = ("frechet_distance", "accuracy", "recall", "diversity")
FOR_COUNT = 100  # samples of the batch in which evaluations are counted
BATCH = 250  # images drawn at once
RECORD, GUIDED = "result.json", "guided.json"
TWICE = "by two evaluations"


@dataclass
class Subject:
    """A small data set, and what its images are judged by.

    Attributes:
        config: YAML file whose objective the recipes replace.
        prompts: of the images that are drawn for each number of steps, in order.
        features: of uint8 images (H, W, 3), (N, D). accuracy: share of images that show their prompts.
        real, real_prompts: features (M, D) of real images, and what they show.
    """

    config: str
    prompts: list[Any]
    features: Callable[[Sequence[np.ndarray]], np.ndarray]
    accuracy: Callable[[Sequence[np.ndarray], Sequence[Any]], float]
    real: np.ndarray
    real_prompts: list[Any]

    def measure(self, images: Sequence[np.ndarray]) -> dict[str, float]:
        """Fréchet distance, accuracy, recall (arXiv 1904.06991) and diversity: the mean distance of two images of a prompt,
        that of two real ones being 1."""
        features = self.features(images)
        return {
            "frechet_distance": frechet_distance(*statistics(features), *statistics(self.real)),
            "accuracy": self.accuracy(images, self.prompts),
            "recall": precision_recall(features, self.real).recall,
            "diversity": spread(features, self.prompts) / spread(self.real, self.real_prompts),
        }


def digits(count: int = 1000) -> Subject:
    """scikit-learn's digits, judged by a classifier of them."""
    judge, data = DigitJudge(), PackageDataset("digits")

    def inputs(images: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([grey_digit(image) for image in images])

    def features(images: Sequence[np.ndarray]) -> np.ndarray:
        return judge.classifier(inputs(images))[0].numpy()

    def accuracy(images: Sequence[np.ndarray], labels: Sequence[int]) -> float:
        return judge.measure(inputs(images), torch.tensor(labels))["accuracy"]

    labels, real = [k % 10 for k in range(count)], judge.classifier(data.images)[0].numpy()
    return Subject(BASE, labels, features, accuracy, real, [int(k) for k in data.labels])


def shapes(each: int = 20) -> Subject:
    """easy-VQA's coloured shapes, judged by rule, and by EfficientNet's features for what has no rule."""
    path = "configs/t2i/shapes.yaml"
    config = load_config(path)
    dataset = build_t2i_dataset(config.data, pixels_per_token(config.model))
    images: dict[str, list[np.ndarray]] = {}
    for index in np.sort(np.concatenate(dataset.batches)):
        there = images.setdefault(dataset.captions(int(index))[0], [])
        if len(there) < each:
            there.append(to_uint8(dataset.load(int(index), rng.generator(0, "data"))["image"][None])[0])

    def accuracy(drawn: Sequence[np.ndarray], prompts: Sequence[str]) -> float:
        return float(score(drawn, prompts)["both"])  # type: ignore[arg-type]

    real, prompts = [image for group in images.values() for image in group], [p for p, group in images.items() for _ in group]
    asked = [prompt for prompt in images for _ in range(each)]
    return Subject(path, asked, image_features, accuracy, image_features(real), prompts)


SUBJECTS: dict[str, Callable[[], Subject]] = {"digits": digits, "shapes": shapes}


def spread(features: np.ndarray, prompts: Sequence[Any]) -> float:
    """Mean distance of two feature vectors (N, D) with the same prompt."""
    names, distances = np.array([str(p) for p in prompts]), []
    for name in dict.fromkeys(names):
        group = torch.from_numpy(features[names == name]).double()
        distances.append(torch.pdist(group).mean().item())
    return float(np.mean(distances))


def recipe_config(path: Path, subject: Subject) -> Config:
    """The subject's config with the objective of a recipe: a file over BASE that sets `model.transition_loss`, TIMES and INPUT.

    Raises:
        ValueError: for other keys, which would change more than the objective.
    """
    recipe, base = flatten(tree := read_tree(path)), flatten(read_tree(BASE))
    changed = [key for key, value in recipe.items() if key not in base or base[key] != value]
    other = [key for key in changed if not key.startswith("model.transition_loss.") and key not in (*TIMES, INPUT)]
    if other:
        own = f"model.transition_loss, {', '.join(TIMES)} and {INPUT}"
        raise ValueError(f"{path} sets {other[0]}; a recipe sets {own}, so that all else is equal")
    objective = tree["model"].get("transition_loss", {})
    tree = read_tree(subject.config, [f"{key}={json.dumps(recipe[key])}" for key in (*TIMES, INPUT) if key in changed])
    tree["model"]["transition_loss"] = objective  # all of it: the subject's own may be another
    config = parse_config(tree)
    t = config.training
    t.sample_steps, t.log_steps, t.tracker = None, 50, None
    t.allow_tf32, t.compile = False, False  # alike on all machines; networks this small are trained before they are compiled
    return config


def forward_units(config: Config) -> float:
    """Evaluations of the network that a training sample costs, counted in a batch halfway through training."""
    network = build_network(config.model.network)
    objective = config.model.build_objective()
    cond, uncond = conditions(network, FOR_COUNT, torch.device("cpu"))
    x, z = torch.randn(2, FOR_COUNT, *traits_of(network).latent_shape())
    counted = 0

    def count(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal counted
        tangents = kwargs.get("tangents")
        counted += len(args[0]) * (3 if torch.is_grad_enabled() else 1) + (0 if tangents is None else len(tangents[0]))

    network.register_forward_pre_hook(count, with_kwargs=True)
    steps = config.training.max_train_steps
    network.train()
    objective.evaluate(network, network, network, FOR_COUNT, x, z, cond, null_kwargs=uncond, step=steps // 2, max_steps=steps)
    return counted / FOR_COUNT


def compare(
    subject: Subject,
    recipes: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    budget: int | None = None,
    scales: Sequence[float] = (),
) -> dict[str, Any]:
    """Train, draw and judge every recipe with every seed, and write the leaderboard of all that is in `out`.

    What is there already is not done again, so several processes may share a folder, each with its own seeds.

    Args:
        budget: steps of TiM as published that buy what every recipe may spend; None: those of the subject's config.
        scales: of guidance to measure too, by a network's own input where it has one and else by a second evaluation.

    Raises:
        ValueError: before anything is trained, for what is no recipe, two of a name, and results in `out` of other settings.
    """
    published = recipe_config(Path(PUBLISHED), subject)
    steps = published.training.max_train_steps if budget is None else budget
    configs = priced_configs(recipes, subject, steps * forward_units(published))
    for name, config in configs.items():
        check_results(out / name, made_of(config))
    for seed in seeds:
        for name, config in configs.items():
            folder = out / name / f"seed-{seed}"
            run_recipe(config, subject, seed, folder)
            if scales:
                run_guided(config, subject, seed, scales, folder)
            results = read_results(out, list(configs))
            write_leaderboard(results, out)
    return results


def priced_configs(recipes: Sequence[Path], subject: Subject, units: float) -> dict[str, Config]:
    """The configs of recipes by their names, each with as many steps as it may take.

    Args:
        units: evaluations of the network, see `forward_units`, that a training sample's place in the batch may cost in all.
    """
    configs: dict[str, Config] = {}
    for path in recipes:
        if path.stem in configs:
            raise ValueError(f"two recipes are called {path.stem}; results go by that name, so call {path} otherwise")
        config = configs[path.stem] = recipe_config(path, subject)
        config.training.max_train_steps = round(units / forward_units(config))
    return configs


def made_of(config: Config) -> dict[str, Any]:
    """What the results of all seeds of a recipe have in common: objective, without what is so by default, times and steps."""
    objective = config.model.objective
    plain = Target(objective.target)
    keywords = {key: value for key, value in objective.params.items() if plain.argument(key) != value}
    times = {name: config.model.transport.params.get(name) for name in (key.rsplit(".", 1)[-1] for key in TIMES)}
    made = {"objective": {"target": objective.target, "params": keywords}, "times": times}
    return {**made, "steps": config.training.max_train_steps}


def check_results(folder: Path, settings: dict[str, Any]) -> None:
    """ValueError when a seed's result in a recipe's folder is of other settings."""
    for path in sorted(folder.glob(f"seed-*/{RECORD}")):
        if {**read_json(path)["made_of"], **settings} != read_json(path)["made_of"]:
            raise ValueError(f"{path.parent} holds a result of other settings; delete it or choose another folder")


def run_recipe(config: Config, subject: Subject, seed: int, folder: Path) -> None:
    """One recipe with one seed: its result.json, unless it is there."""
    if (folder / RECORD).is_file():
        return
    began = time.perf_counter()
    train(config, folder, seed, ClassTask if config.model.text_encoder_dir is None else CaptionTask)
    trained = time.perf_counter() - began
    sampler = trained_sampler(config, seed, folder)
    scores = {n: subject.measure(draw(sampler, subject.prompts, num_steps=n)) for n in NFE}
    write_json(folder / RECORD, {"made_of": {**made_of(config), "seed": seed}, "seconds": trained, "nfe": scores})


def run_guided(config: Config, subject: Subject, seed: int, scales: Sequence[float], folder: Path) -> None:
    """guided.json of a trained recipe: {scale: {steps: scores}}, of the scales that are not there yet.

    A network that takes guidance as an input is measured both ways, by a second evaluation under "scale TWICE".
    """
    path = folder / GUIDED
    scores = read_json(path) if path.is_file() else {}
    by_input = config.model.network.params.get("guidance_input", False)
    ways: dict[str, dict[str, Any]] = {}
    for scale in map(float, scales):
        # In all steps, the first too, as the network's input guides all of them.
        twice = {"cfg_scale": scale, "guide_first_step": True}
        ways[str(scale)] = {"guidance_input": scale} if by_input else twice
        if by_input and scale > 1:
            ways[f"{scale} {TWICE}"] = twice
    missing = [name for name in ways if name not in scores]
    sampler = trained_sampler(config, seed, folder) if missing else None
    for name in missing:
        assert sampler is not None
        scores[name] = {n: subject.measure(draw(sampler, subject.prompts, num_steps=n, **ways[name])) for n in NFE}
        write_json(path, scores)


def trained_sampler(config: Config, seed: int, folder: Path) -> Sampler:
    """The moving average of a run's network, ready to draw."""
    settings = SampleSettings(num_steps=1, global_seed=seed, tf32=False)
    return load_sampler(config, find_weights(folder), settings, best_device())


def draw(sampler: Sampler, prompts: Sequence[Any], **settings: Any) -> list[np.ndarray]:
    """uint8 images (H, W, 3), one of each prompt, under other settings."""
    sampler = sampler.at(replace(sampler.settings, **settings))
    places = range(0, len(prompts), BATCH)
    return [image for k in places for image in sampler.draw(prompts[k : k + BATCH], range(len(prompts))[k : k + BATCH])[0]]


def read_results(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Recipes with the scores of all their seeds: {name: {"steps", "seconds", "seeds", "nfe": {n: {metric: [values]}}}}.

    Guided ones stand beside them under "name w=scale", the number of steps in place of evaluations.
    """
    results: dict[str, Any] = {}
    for name in names:
        runs = [read_json(path) for path in sorted((out / name).glob(f"seed-*/{RECORD}"))]
        if runs:
            shared = {
                "steps": runs[0]["made_of"]["steps"],
                "seconds": float(np.mean([run["seconds"] for run in runs])),
                "seeds": [run["made_of"]["seed"] for run in runs],
            }
            results[name] = {**shared, "nfe": _gather([run["nfe"] for run in runs])}
            guided = {
                seed: read_json(path) for seed in shared["seeds"] if (path := out / name / f"seed-{seed}" / GUIDED).is_file()
            }
            for scale in dict.fromkeys(scale for run in guided.values() for scale in run):
                scores = {seed: run[scale] for seed, run in guided.items() if scale in run}
                results[f"{name} w={scale}"] = {**shared, "seeds": list(scores), "nfe": _gather(list(scores.values()))}
    return results


def _gather(runs: Sequence[dict[str, dict[str, float]]]) -> dict[int, dict[str, list[float]]]:
    """{steps: {metric: [a value a run]}}."""
    return {n: {metric: [run[str(n)][metric] for run in runs] for metric in METRICS} for n in NFE}


def write_leaderboard(results: Mapping[str, Any], out: Path) -> None:
    """leaderboard.json, leaderboard.md (mean ± standard deviation over seeds) and leaderboard.png."""
    write_json(out / "leaderboard.json", results)
    write_text(out / "leaderboard.md", "\n\n".join(table(results, metric) for metric in METRICS) + "\n")
    plot(results, out / "leaderboard.png")


def table(results: Mapping[str, Any], metric: str) -> str:
    """Markdown: a row a recipe, a column a number of evaluations."""
    head = ["recipe", "steps", "seconds", "seeds", *(f"{n} NFE" for n in NFE)]
    rows = [head, ["---"] * len(head)]
    for name, result in results.items():
        scores = [result["nfe"][n][metric] for n in NFE]
        cells = [f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in scores]
        rows.append([name, str(result["steps"]), f"{result['seconds']:.0f}", str(len(result["seeds"])), *cells])
    return f"{metric}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Fréchet distance, accuracy and diversity against NFE, bars over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 3), ("frechet_distance", "accuracy", "diversity"), strict=True):
        for k, (name, result) in enumerate(results.items()):
            values = np.array([result["nfe"][n][metric] for n in NFE])
            places = np.array(NFE) * 1.03 ** (k - len(results) / 2)  # side by side, so that bars can be told apart
            line = "-" if k < 10 else "--"  # colours repeat
            axis.errorbar(places, values.mean(1), values.std(1), ls=line, marker="o", ms=4, capsize=2, lw=1.2, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(NFE, [str(n) for n in NFE])
        axis.set(
            xlabel="network evaluations (NFE)", title=metric.replace("frechet_distance", "Fréchet distance (lower is better)")
        )
        axis.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
