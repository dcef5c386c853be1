"""What the command lines share: help, messages, errors, and the table of what the console scripts run."""

import argparse
import ctypes
import inspect
import io
import logging
import os
import pkgutil
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")  # by name: torch's class would have to be imported
FROM_OUTSIDE = {  # what RuntimeErrors say that the program cannot help -> what to tell
    "Connection closed by peer": "another process of this run has ended; its own message says why",
    "DataLoader worker (pid": "a process that reads data was killed: too little memory, or /dev/shm is too small; take fewer "
    "num_workers",
}
LAUNCHERS = {b"torchrun", b"torch.distributed.run", b"accelerate", b"accelerate-launch", b"accelerate.commands.launch"}
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends

# {command: (function, what it does)}; functions are imported when they are called, so that help and mistakes answer at once
TRAIN = {
    "c2i": ("tim.training.command:train_c2i", "train a class-conditional model"),
    "t2i": ("tim.training.command:train_t2i", "train a text-to-image model"),
}
SAMPLE = {
    "c2i": ("tim.generation.commands:sample_c2i", "images of classes"),
    "t2i": ("tim.generation.commands:sample_t2i", "images of your own prompts"),
    "geneval": ("tim.generation.commands:sample_geneval", "four images of every GenEval prompt"),
    "dpgbench": ("tim.generation.commands:sample_dpgbench", "a grid of images of every DPG-Bench prompt"),
    "mjhq30k": ("tim.generation.commands:sample_mjhq30k", "an image of every MJHQ-30K prompt"),
}
EVALUATE = {
    "adm": ("tim.evaluation.commands:adm", "FID, sFID, inception score, precision and recall as ADM measures them"),
    "folder": ("tim.evaluation.commands:folder", "distances between folders of images under features of your choice"),
    "mjhq-fid": ("tim.evaluation.commands:mjhq_fid", "FID of MJHQ-30K, overall and by category"),
    "mjhq-clip": ("tim.evaluation.commands:mjhq_clip", "CLIP score of MJHQ-30K"),
    "geneval": ("tim.evaluation.commands:geneval", "GenEval's images, by an object detector and CLIP"),
    "dpg": ("tim.evaluation.commands:dpg", "DPG-Bench's images, by answers to its questions"),
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows the defaults that say something (not None, nor a switch that is off)."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        empty = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, list)
        switch = action.default is False and not isinstance(action, argparse.BooleanOptionalAction)
        return text if action.required or empty or switch or "default:" in text else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as `run_command` does."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"error: {message}; --help lists the flags\n")


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, whose help keeps the description's lines and shows defaults."""
    return Parser(description=inspect.cleandoc(description or ""), formatter_class=HelpFormatter)


def usable_path(text: str) -> Path:
    """A path of the command line that the system takes: not empty, as from an unset variable, nor too long."""
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:200]} cannot be a path: {error.strerror}") from error
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def add_config_arguments(parser: argparse._ActionsContainer, config_help: str = "YAML file") -> None:
    """Add --config and its overrides to a parser or group; see `parse_with_overrides`."""
    parser.add_argument("--config", required=True, metavar="FILE", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration overrides")
    add_allow_code(parser)


class AllowCode(argparse.Action):
    """Calls `tim.targets.allow_code`, which costs an import that other command lines do without."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, option_string: object = None
    ) -> None:
        from tim.targets import allow_code

        try:
            allow_code(str(values))
        except ValueError as error:
            parser.error(str(error))


def add_allow_code(parser: argparse._ActionsContainer) -> None:
    """Add --allow-code, which every command that reads a configuration has."""
    what = "let the configuration name classes of this module, which runs its code; may be repeated"
    parser.add_argument("--allow-code", action=AllowCode, default=argparse.SUPPRESS, metavar="MODULE", help=what)


def parse_with_overrides(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line whose overrides may stand among the flags, and be written like flags: `--a.b=c`."""
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_intermixed_args([re.sub(r"^--(?=\w+(\.\w+)+=)", "", word) for word in words])


def check_least(args: argparse.Namespace, **least: int) -> None:
    """ValueError for the first of these numbers among arguments that is below its least value; None passes."""
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {minimum}, got {value}")


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; what a user can mend becomes `error: ...` and exit code 2 (a traceback with TIM_DEBUG=1).

    That is ValueError, OSError (disks, permissions, paths, connections) and too little memory; any other exception is a fault
    of the program and keeps its traceback. Ctrl-C ends with code 130. Warnings are printed as `warning: ...`, without the
    line of code that raised them; `tim`'s log goes to stderr. In the end the process group is left, if `main` started one.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    _end_with_launcher()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # captions and names of files are printed whatever the locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    failed = True
    try:
        with log_to_stderr():
            main()
        failed = False
    except SystemExit:  # of all processes alike, such as a trainer's on a signal
        failed = False
        raise
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # who reads our output has gone, as `head` does; nothing may be flushed to it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        words = words_of(error)
        if words is None or os.environ.get("TIM_DEBUG") == "1":
            raise
        print(f"error: {words}", file=sys.stderr)
        sys.exit(2)
    finally:
        _leave_process_group(failed)


def words_of(error: Exception) -> str | None:
    """What to tell a user of an exception; None when it is a fault of the program."""
    text = str(error) or type(error).__name__
    if type(error).__name__ in OUT_OF_MEMORY:
        return f"{text.splitlines()[0]}; take smaller batches"
    if isinstance(error, RuntimeError):
        return next((words for part, words in FROM_OUTSIDE.items() if part in text), None)
    if not isinstance(error, ValueError | OSError):
        return None
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if text.startswith("Caught ") and "Original Traceback" in text:  # a DataLoader hands tracebacks on as text
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text


def _end_with_launcher() -> None:
    """Let the system end this process when torchrun or `accelerate launch` above it ends without a word, as by kill -9.

    Orphans would work on unseen and keep their folder locked. SIGTERM lets a trainer leave a checkpoint.
    """
    try:
        above = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")[:4]  # python -u -m torch.distributed.run
    except OSError:  # no Linux
        return
    if LAUNCHERS & set(map(os.path.basename, above)):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class _Stderr(logging.Handler):
    """Writes lines to today's sys.stderr, above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write what `logging.getLogger("tim")` and its children are told to stderr, with time and level.

    Rank 0 writes INFO and above, other processes WARNING and above with their rank; TIM_LOG_LEVEL (DEBUG, INFO, WARNING, ERROR)
    sets one level for all. Results are not logged: commands print them on stdout.

    Raises:
        ValueError: TIM_LOG_LEVEL is none of the levels.
    """
    rank = int(os.environ.get("RANK", 0))
    level = os.environ.get("TIM_LOG_LEVEL", "WARNING" if rank else "INFO").upper()
    if level not in LEVELS:
        raise ValueError(f"TIM_LOG_LEVEL={level!r} is not one of {', '.join(LEVELS)}")
    handler = _Stderr()
    prefix = f"rank {rank}: " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("tim")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # a library that gives the root logger a handler would show every line twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _leave_process_group(failed: bool) -> None:
    """`tim.distributed.leave_process_group`, where there can be a group: commands without torch end sooner."""
    if "torch" in sys.modules:
        from tim.distributed import leave_process_group

        leave_process_group(failed)


def train() -> None:
    """The console script tim-train."""
    _run_script("tim-train", "Train Transition Models.", TRAIN)


def sample() -> None:
    """The console script tim-sample."""
    _run_script("tim-sample", "Draw images; run the same command again to continue.", SAMPLE)


def evaluate() -> None:
    """The console script tim-evaluate."""
    _run_script("tim-evaluate", "Measure generated images.", EVALUATE)


def _run_script(program: str, description: str, commands: dict[str, tuple[str, str]]) -> None:
    """Run the command that the first word names on the words after it."""
    parser = command_parser(description)
    parser.prog = program
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=f"{program} COMMAND --help says more")
    for name, (_, purpose) in commands.items():
        names.add_parser(name, help=purpose, add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f"{program} {command}"]  # the name in usage and error messages of the command's own parser
    run_command(lambda: pkgutil.resolve_name(commands[command][0])())
