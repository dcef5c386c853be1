"""Models of transformers that look at images: loaded whole, or refused with the reason."""

from collections.abc import Callable
from typing import Any

import torch

from tim.models.hub import hub_options
from tim.models.loading import model_identity


def load_pretrained(
    name: str,
    choose: Callable[[Any], tuple[Any, ...]],
    refusal: str,
    device: torch.device,
    unused: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """What is built around a frozen model and its processors.

    Args:
        name: folder or hub id.
        choose: configuration to the builder (called with the model, what tells it apart (see `model_identity`), and the
            processors), and the classes of the model and of the processors; raises ValueError for other kinds.
        refusal: beginning of the error's message, such as `--model-path x is no detector`.
        device: where the model goes.
        unused: endings of weights that the model may lack.
        options: for the model's `from_pretrained`.

    Raises:
        ValueError: when it does not load, is of another kind, lacks weights or cannot be built.
    """
    from transformers import AutoConfig

    safe = {"trust_remote_code": False}  # None would ask, and a pipe say yes
    try:
        safe |= hub_options(name)
        config = AutoConfig.from_pretrained(name, **safe)
        build, kind, *processors = choose(config)
        model, report = kind.from_pretrained(name, output_loading_info=True, **options, **safe)
        missing = set(report["missing_keys"]) & dict(model.named_parameters()).keys()
        unset = sorted(key for key in missing if not key.endswith(unused))
        if unset:
            raise ValueError(f"it lacks {len(unset)} weights, first: {unset[0]}")
        model = model.eval().requires_grad_(False).to(device)
        loaded = (processor.from_pretrained(name, **safe) for processor in processors)
        return build(model, model_identity(name, config), *loaded)
    except Exception as error:  # the failures of transformers, tokenizers and safetensors share no base class
        raise ValueError(f"{refusal}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What is wrong, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
