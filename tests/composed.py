"""Configurations as the command line composes them, without a run."""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from fedsparse.job.config import register_resolvers
from fedsparse.job.shipped import conf_dir


def composed(*overrides):
    """Compose ``train`` with overrides; resolvers are known."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))
