"""The import paths of the published code: `from tim.utils.misc_utils import instantiate_from_config` and its like.

The old modules have no files here. A finder at the end of `sys.meta_path` makes them when they are imported; each name is one
of `tim.compat.functions`, and a DeprecationWarning says where its work is done in this package.
"""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# {old module: {name: its home here}}; None for the packages above them.
OLD: dict[str, dict[str, str] | None] = {
    "tim.utils": None,
    "tim.utils.misc_utils": {
        "instantiate_from_config": "tim.config.Target(...).build()",
        "get_obj_from_str": "tim.config.Target(...).resolve()",
        "init_from_ckpt": "tim.checkpoint.weights.find_weights(...).read() and tim.models.loading.load_strict",
        "create_npz_from_sample_folder": "--npz of projects/sample/sample_c2i_ddp.py",
        "update_ema": "tim.training.ema.EMA",
    },
    "tim.models.vae": {
        "get_sd_vae": "tim.models.autoencoders.Autoencoder.from_pretrained",
        "get_dc_ae": "tim.models.autoencoders.Autoencoder.from_pretrained",
        "sd_vae_encode": "tim.models.autoencoders.Autoencoder.encode",
        "sd_vae_decode": "tim.models.autoencoders.Autoencoder.decode",
        "dc_ae_encode": "tim.models.autoencoders.Autoencoder.encode",
        "dc_ae_decode": "tim.models.autoencoders.Autoencoder.decode",
    },
    "tim.models.utils": None,
    "tim.models.utils.text_encoders": {
        "load_text_encoder": "tim.models.text_encoders.TextEncoder",
        "encode_prompt": "tim.models.text_encoders.TextEncoder.__call__",
    },
}


class OldPaths(MetaPathFinder, Loader):
    """Finds and makes the modules of `OLD`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        return importlib.util.spec_from_loader(name, self, is_package=OLD[name] is None) if name in OLD else None

    def exec_module(self, module: ModuleType) -> None:
        """Names are looked up when they are asked for, each with its note."""
        homes = OLD[module.__name__] or {}

        def lookup(name: str) -> Any:
            if name not in homes:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            warnings.warn(f"{module.__name__}.{name} is now {homes[name]}", DeprecationWarning, stacklevel=2)
            from tim.compat import functions

            return getattr(functions, name)

        module.__dict__.update(__getattr__=lookup, __all__=list(homes))


def install() -> None:
    """Let Python find the old modules."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
