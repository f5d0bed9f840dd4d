"""The command line: what was typed is checked first, and whatever goes wrong is one line."""

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
from fedsparse.federation.reports import Diverged
from fedsparse.job.advice import no_key, no_option
from fedsparse.job.config import RunFolderUsed, register_resolvers
from fedsparse.job.typed import arranged, given_twice

EXPECTED = (ValueError, OSError, Diverged, HydraException, OmegaConfBaseException, YAMLError)


def one_line(error: BaseException) -> str:
    """Say an error in one line; of what failed while Hydra built a part, the part's own words."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    text = _hydras(error) or " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    expected = isinstance(error, EXPECTED)
    return printable(text if expected and text else f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)")


def _hydras(error: BaseException) -> str:
    """Say what Hydra and OmegaConf say in their own way; empty for other errors."""
    said = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return no_option(group, option, error.options or ())
    if isinstance(error, ConfigCompositionException) and said.startswith("Could not override"):
        return no_key(said.split()[3].strip("'."))
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.msg:
        return " ".join(f"{error.full_key}: {error.msg}".split("full_key:")[0].split())
    return ""


@contextmanager
def hydras_as_value_errors() -> Iterator[None]:
    """Let what Hydra and OmegaConf raise be a ValueError of the line that the command line prints."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(one_line(error)) from error
    except RunFolderUsed as error:
        raise ValueError(str(error).removeprefix("fedsparse: ")) from None


@contextmanager
def logging_kept() -> Iterator[None]:
    """Put the log's handlers back after a run: of several runs in one process each writes to its own run.log."""
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
    """Check what was typed, and let Hydra read its flags wherever they stand."""
    sys.argv[1:] = arranged(sys.argv[1:])
    for line in given_twice(sys.argv[1:]):
        print(printable(f"fedsparse: warning: {line}"), file=sys.stderr)


def on_command_line(body: Callable[[], Any]) -> None:
    """Carry out what a person typed: errors are one line, and a traceback with HYDRA_FULL_ERROR=1."""
    register_resolvers()
    warnings.formatwarning = lambda message, *_, **__: f"fedsparse: warning: {printable(message)}\n"
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets errors through to us
    logging.raiseExceptions = False  # a run.log on a full disk is no traceback
    with signals.command():
        try:
            body()
        except Exception as error:
            if full:
                raise
            print(f"fedsparse: {one_line(error)}", file=sys.stderr)
            sys.exit(1)
