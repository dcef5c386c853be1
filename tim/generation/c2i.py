"""Class labels of the images of a sampling run."""

from collections.abc import Sequence

import torch

from tim import rng
from tim.config import Target
from tim.generation.engine import Conditions
from tim.models.network import traits_of


def class_conditions(labels: str, num_classes: int | None, network: Target, seed: int, device: torch.device) -> Conditions:
    """Class labels of image k: `cycle` is k mod num_classes, `random` is drawn from (seed, k), `3,7,11` cycles through a list.

    Args:
        num_classes: how many classes to cycle through or draw from; all when None.
        network: the config's network, which says how many classes it has and whether there is a null class.

    Raises:
        ValueError: for a label that the network does not have.
    """
    traits = traits_of(network)
    if traits.num_classes is None:
        raise ValueError("the network does not say how many classes it has: give its constructor the keyword num_classes")
    network_classes, has_null = traits.num_classes, traits.class_dropout_prob > 0
    num_classes = network_classes if num_classes is None else num_classes
    if not 1 <= num_classes <= network_classes:
        raise ValueError(f"--num-classes must lie between 1 and the network's {network_classes}, got {num_classes}")
    listed: list[int] = []
    if labels not in ("cycle", "random"):
        try:
            listed = [int(v) for v in labels.split(",")]
        except ValueError:
            raise ValueError(f"--class-labels {labels!r} is neither cycle, random nor a list like 3,7,11") from None
        wrong = [v for v in listed if not 0 <= v < network_classes]
        if wrong:
            raise ValueError(f"--class-labels: label {wrong[0]} is out of range, the network has 0 to {network_classes - 1}")

    def label(k: int) -> int:
        if listed:
            return listed[k % len(listed)]
        return k % num_classes if labels == "cycle" else int(rng.generator(seed, "label", index=k).integers(num_classes))

    def conditions(indices: Sequence[int]) -> tuple[dict, dict | None]:
        y = torch.tensor([label(k) for k in indices], device=device)
        return {"y": y}, {"y": torch.full_like(y, network_classes)} if has_null else None

    return conditions
