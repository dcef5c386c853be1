"""The model card of a saved pipeline."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tim.files import read_json
from tim.models.network import traits_of

METRICS = "metrics.json"
GENERATED = "This model card has been automatically generated"  # what diffusers writes where there is no card
LICENCE = "apache-2.0"
TEXT = """# {name}

A Transition Model (TiM, arXiv 2509.04394): one network that draws in any number of steps, {what}.

```python
import torch

from tim.pipelines import {name}

pipe = {name}.from_pretrained("OWNER/NAME")
image = pipe({example}, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
```

The classes are those of the package `tim-pytorch`.
"""


def write_card(pipeline: Any, folder: Path) -> None:
    """Write README.md into a saved pipeline's folder; of a card that is there, text and metadata are kept.

    Args:
        pipeline: the one that was saved there.
    """
    path = folder / "README.md"
    is_text = traits_of(pipeline.transformer).cap_feat_dim is not None
    known = ModelCardData(
        library_name="diffusers",
        license=LICENCE,
        pipeline_tag="text-to-image" if is_text else "unconditional-image-generation",  # the hub's nearest to classes
        tags=["diffusers", "transition-models", "few-step"],
    )
    card = ModelCard.load(path) if path.is_file() else None
    if card is None or GENERATED in card.text:
        card = ModelCard(f"---\n{known.to_yaml()}\n---\n{_text(pipeline, folder)}")
    for key, value in known.to_dict().items():
        card.data[key] = card.data.get(key) or value
    card.save(path)


def _text(pipeline: Any, folder: Path) -> str:
    traits = traits_of(pipeline.transformer)
    is_text = traits.cap_feat_dim is not None
    what = "of what a caption says" if is_text else f"of one of {traits.num_classes} classes"
    text = TEXT.format(name=type(pipeline).__name__, what=what, example='"a lighthouse in a storm"' if is_text else "0")
    try:
        return f"{text}\n## Quality\n\n{quality_table(folder / METRICS)}\n"
    except (FileNotFoundError, ValueError):  # none, or one of another kind that came with the pipeline
        return text


def quality_table(path: Path) -> str:
    """Quality against network function evaluations (NFE), of a quickstart's metrics.json, in Markdown.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no metrics file {path}")
    try:
        rows = read_json(path)["nfe"]
        names = [key for key, value in next(iter(rows.values())).items() if isinstance(value, float | int)]
        lines = [" | ".join(["NFE", *(name.replace("_", " ") for name in names)]), " | ".join(["---"] * (len(names) + 1))]
        lines += [" | ".join([nfe, *(f"{row[name]:g}" for name in names)]) for nfe, row in rows.items()]
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is no metrics.json of a quickstart: {error!r}") from error
    return "\n".join(f"| {line} |" for line in lines)
