"""The configuration of a deployed run: composed on the machine that submits it, the same for server and nodes.

A node changes only what is its own (``OWN``); of all else its hash must be the server's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from fedsparse.core import files
from fedsparse.core.checks import check_choice, check_flag, check_number
from fedsparse.core.folder import CONFIG, DEPLOYED, HYDRA, OVERRIDES
from fedsparse.job import trust
from fedsparse.job.assemble import assemble, assemble_course
from fedsparse.job.command import hydras_as_value_errors
from fedsparse.job.config import check, register_resolvers
from fedsparse.job.parts import Assembly
from fedsparse.job.resume import Job, choices_and_group
from fedsparse.job.shipped import conf_dir
from fedsparse.job.typed import check_typed

OWN = ("data.root", "trainer", "federation.store", "trust")  # a node's own keys, and those below them
SHARED = "trainer.precision"  # below them, but of all
ON_MISSING = ("drop", "wait", "stop")
ALONE = ("federation.cohort=1", "trainer.devices=1", "trainer.num_nodes=1", "calibration.cache=null")


@dataclass(frozen=True)
class Options:
    """The options ``deploy.*``.

    Args:
        timeout: seconds that the server waits for an answer.
        min_clients: nodes that must be there before the first message; None: one for each client.
        on_missing: ``drop`` closes a round with those who answered, ``wait`` waits on, ``stop`` ends the run.
        max_share: largest share of one node's weight in an average.
        insecure: whether messages may travel without TLS, on a loopback address.

    Raises:
        ValueError: an option is invalid; one line.

    """

    timeout: float = 600.0
    min_clients: int | None = None
    on_missing: str = "drop"
    max_share: float = 1.0
    insecure: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_number("deploy.timeout", self.timeout, above=0)
        check_number("deploy.min_clients", self.min_clients, whole=True, least=1, null=True)
        check_choice("deploy.on_missing", self.on_missing, *ON_MISSING)
        check_number("deploy.max_share", self.max_share, above=0, most=1)
        check_flag("deploy.insecure", self.insecure)


@dataclass(frozen=True)
class Deployed:
    """A deployed run's configuration.

    Attributes:
        config: of the run, unresolved.
        choices: option chosen of each config group.
        overrides: as typed.
        options: ``deploy.*``.

    """

    config: Mapping[str, Any]
    choices: Mapping[str, str]
    overrides: Sequence[str]
    options: Options

    @property
    def hash(self) -> str:
        """Hash of what server and nodes must agree on."""
        text = json.dumps(shared(self.config), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def text(self) -> str:
        """Write as YAML."""
        plain = {"config": dict(self.config), "choices": dict(self.choices), "overrides": list(self.overrides)}
        return yaml.safe_dump(plain | {"deploy": asdict(self.options)}, sort_keys=False)

    @classmethod
    def read(cls, text: str) -> Deployed:
        """Read what ``text`` wrote.

        Raises:
            ValueError: it is something else.

        """
        try:
            plain = yaml.safe_load(text)
            parts = plain["config"], plain["choices"], plain["overrides"], Options(**plain["deploy"])
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(f"this is no configuration of a deployed run ({type(error).__name__})") from None
        return cls(*parts)

    def at_node(self, own: Sequence[str], client: int, alone: bool) -> Assembly:
        """Assemble the run at a node; targets that are neither shipped nor trusted are refused.

        Args:
            own: the node's overrides.
            client: that is there.
            alone: whether the data set is this client's alone; else it is partitioned as everywhere.

        Raises:
            ValueError: a key is not the node's own, or a target is not trusted; one line.

        """
        trusted, overrides = trust.split(own)
        raw = json.loads(json.dumps(self.config, default=str))
        for override in overrides:
            key, _, _ = override.partition("=")
            if not is_own(key):
                mine = ", ".join(OWN)
                raise ValueError(f"{override}: a node sets {mine} (not {SHARED}); the rest is the server's")
            _set(raw, override)
        for override in ALONE:
            _set(raw, override)
        cfg = trust.admitted(raw, trusted, typed=[override.partition("=")[0] for override in overrides])
        return assemble_alone(cfg, client) if alone else assemble(cfg)

    def job(self, folder: Path, resumed: bool) -> Job:
        """Build the job of the server; who submits it may name code, as on a command line."""
        typed = [override.partition("=")[0].lstrip("+") for override in self.overrides]
        cfg = trust.admitted(self.config, typed=typed)
        OmegaConf.set_struct(cfg, True)
        return Job(cfg, folder, dict(self.choices), resumed=resumed, begun=int(cfg.federation.rounds))

    def store(self, folder: Path) -> None:
        """Write the configuration into a run folder, in the files of every run, and as it was deployed."""
        typed = [override for override in self.overrides if not override.startswith("deploy.")]
        node = {"runtime": {"choices": dict(self.choices)}, "mode": "RUN", "sweep": {"dir": str(folder.parent)}}
        (folder / CONFIG).parent.mkdir(parents=True, exist_ok=True)
        files.write(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(self.config))))
        files.write(folder / HYDRA, OmegaConf.to_yaml(OmegaConf.create({"hydra": node})))
        files.write(folder / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(typed)))
        files.write(folder / DEPLOYED, self.text())


def assemble_alone(cfg: DictConfig, client: int) -> Assembly:
    """Assemble a run on a data set that is one client's alone: it holds the whole training split.

    The partition is not asked; ids, and so the random numbers, are those of the run.
    """
    single = cfg.copy()
    single.federation.num_clients, single.federation.clients_per_round = 1, 1
    single.partition = {"_target_": "fedsparse.data.partition.iid", "_partial_": True}
    assembly = assemble(single)
    dataset, nobody = assembly.problem.dataset, [np.zeros(0, dtype=np.int64)] * client
    parts, tests, vals = ([*nobody, np.arange(len(s.y))] for s in (dataset.train, dataset.test, dataset.val))
    problem = replace(assembly.problem, parts=parts, tests=tests, vals=vals)
    return replace(assembly, problem=problem, course=assemble_course(single, problem))


def compose(overrides: Sequence[str]) -> str:
    """Compose and check the configuration of a deployed run, ``deploy.*`` included: the text for server and nodes.

    Raises:
        ValueError: a key or value is invalid; one line.

    """
    return deployed(overrides).text()


def deployed(overrides: Sequence[str]) -> Deployed:
    """Compose and check as ``compose`` does."""
    register_resolvers()
    check_typed(overrides)
    typed = [override for override in overrides if not override.startswith("deploy.")]
    options = _options([override for override in overrides if override.startswith("deploy.")])
    GlobalHydra.instance().clear()
    with hydras_as_value_errors(), initialize_config_dir(str(conf_dir()), job_name="train", version_base="1.3"):
        cfg = hydra_compose("train", overrides=[*typed, *ALONE], return_hydra_config=True)
        choices, _ = choices_and_group(cfg.hydra)
        config = {key: value for key, value in OmegaConf.to_container(cfg).items() if key != "hydra"}  # type: ignore[union-attr]
    checked = OmegaConf.create(config)
    OmegaConf.set_struct(checked, True)
    check(checked, choices)
    return Deployed(config, choices, list(overrides), options)  # type: ignore[arg-type]


def _options(overrides: Sequence[str]) -> Options:
    """Read ``deploy.*``.

    Raises:
        ValueError: an unknown key, or an invalid value.

    """
    known, found = [field.name for field in fields(Options)], dict[str, Any]()
    for override in overrides:
        parsed = OverridesParser.create().parse_override(override)
        name = parsed.get_key_element().removeprefix("deploy.")
        if name not in known:
            raise ValueError(f"deploy.{name} is no key; there are {', '.join(f'deploy.{one}' for one in known)}")
        found[name] = parsed.value()
    return Options(**found)


def is_own(key: str) -> bool:
    """Whether a key is a node's own.

    >>> is_own("data.root"), is_own("trainer.accelerator"), is_own("trainer.precision"), is_own("seed")
    (True, True, False, False)
    """
    return key != SHARED and any(key == one or key.startswith(f"{one}.") for one in OWN)


def shared(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Copy a configuration without a node's own keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        place = f"{above}{key}"
        if isinstance(value, Mapping):
            found[key] = shared(value, f"{place}.")
        elif not is_own(place):
            found[key] = value
    return found


def _set(raw: dict[str, Any], override: str) -> None:
    """Set one key of an unresolved configuration, in place."""
    parsed = OverridesParser.create().parse_override(override)
    *groups, last = parsed.get_key_element().split(".")
    for group in groups:
        raw = raw.setdefault(group, {})
    raw[last] = parsed.value()
