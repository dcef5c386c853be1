"""Folders and hub ids: whether a model can be had is known at once, not after half a minute of retries."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

TIMEOUT = 10.0  # seconds for the hub's first answer


def hub_options(name: str) -> dict[str, bool]:
    """Keywords for `from_pretrained(name)`: without a connection only the hub's cache is read.

    Args:
        name: folder or hub id.

    Raises:
        ValueError: when it is neither; tells a wrong id from a hub that cannot be reached.
    """
    if Path(name).is_dir():
        return {}
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
        return {}
    except HFValidationError:
        raise ValueError("there is no such folder, and a hub id has the form OWNER/NAME") from None
    except RepositoryNotFoundError:
        raise ValueError("there is no such folder, and the hub has no such model (private ones need `hf auth login`)") from None
    except (OSError, httpx.HTTPError) as error:
        if any(isinstance(try_to_load_from_cache(name, f"{part}config.json"), str) for part in ("", "vae/")):
            return {"local_files_only": True}
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"there is no such folder, and the hub cannot be reached ({reason}). Offline, name a folder, or a model that was "
            "downloaded before"
        ) from None
