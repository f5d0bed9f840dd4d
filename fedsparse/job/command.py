"""The command line: arguments are checked before Hydra reads them, and each error is one line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedsparse.core import signals
from fedsparse.data.files import printable
from fedsparse.federation.diverged import Diverged
from fedsparse.job.advice import no_key, no_option
from fedsparse.job.config import RunFolderUsed, register_resolvers
from fedsparse.job.typed import arranged, given_twice

EXPECTED = (ValueError, OSError, Diverged, HydraException, OmegaConfBaseException, YAMLError)


def one_line(error: BaseException) -> str:
    """Write an error in one line; of an error while Hydra built a part, the part's own message."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    text = _hydras(error) or " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    expected = isinstance(error, EXPECTED)
    return printable(text if expected and text else f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)")


def _hydras(error: BaseException) -> str:
    """Rewrite a message of Hydra or OmegaConf; empty for other errors."""
    message = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return no_option(group, option, error.options or ())
    if isinstance(error, ConfigCompositionException) and message.startswith("Could not override"):
        return no_key(message.split()[3].strip("'."))
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.msg:
        return " ".join(f"{error.full_key}: {error.msg}".split("full_key:")[0].split())
    return ""


@contextmanager
def hydras_as_value_errors() -> Iterator[None]:
    """Convert errors of Hydra and OmegaConf to a ValueError with the line that the command line prints."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(one_line(error)) from error
    except RunFolderUsed as error:
        raise ValueError(str(error).removeprefix("fedsparse: ")) from None


@contextmanager
def logging_kept() -> Iterator[None]:
    """Restore the root logger's handlers after a run, so that each run of a process writes to its own run.log."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(before):
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)


def arrange() -> None:
    """Check the arguments, and reorder them so that Hydra accepts flags at any position."""
    sys.argv[1:] = arranged(sys.argv[1:])
    for line in given_twice(sys.argv[1:]):
        print(printable(f"fedsparse: warning: {line}"), file=sys.stderr)


def on_command_line(body: Callable[[], Any]) -> None:
    """Run a command: an error is one line and exit code 1, or a traceback with HYDRA_FULL_ERROR=1."""
    register_resolvers()
    warnings.formatwarning = lambda message, *_, **__: f"fedsparse: warning: {printable(message)}\n"
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises errors instead of printing them
    logging.raiseExceptions = False  # no traceback if run.log cannot be written, as on a full disk
    with signals.command():
        try:
            body()
        except Exception as error:
            if full:
                raise
            print(f"fedsparse: {one_line(error)}", file=sys.stderr)
            sys.exit(1)
