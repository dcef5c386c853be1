"""What the command lines share: one clear line and exit code 2 for what the user can mend."""

import os
import sys
from collections.abc import Callable


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; ValueError and FileNotFoundError become `error: ...` and exit code 2 (a traceback with TIM_DEBUG=1)."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("TIM_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
