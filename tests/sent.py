"""Run folders as somebody might send them."""

from __future__ import annotations

import yaml
from omegaconf import OmegaConf

SHORT = ["model=mlp", "logger=csv", "pictures=false", "federation.rounds=1", "federation.local_steps=1"]
SHORT += ["calibration.head_steps=1", "mask_rule=random"]


def change(folder, **values):
    """Set dotted keys, ``__`` for the dot, of a stored configuration, and in what was typed for it."""
    path = folder / ".hydra" / "config.yaml"
    cfg = OmegaConf.load(path)
    typed = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    for key, value in values.items():
        name = key.replace("__", ".")
        OmegaConf.update(cfg, name, value, force_add=True)
        entries = value.items() if isinstance(value, dict) else [("", value)]
        typed += [f"++{name}{'.' if inner else ''}{inner}={written(part)}" for inner, part in entries]
    OmegaConf.save(cfg, path)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(typed))


def written(value):
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return f"'{value}'" if isinstance(value, str) else str(value).lower()
