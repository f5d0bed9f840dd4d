"""What a landscape is asked for: ``key=value``, each value as YAML writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import yaml

from fedsparse.core.checks import check_choice, check_flag, check_positive, check_whole, finite

GLOBAL, REFERENCE = "global", "reference"  # models that are no client
SIGMA_OF = "sigma.of"  # as it is typed; the field is called sigma_of
CLIENT = "client:"  # before the number of a client whose data is meant


@dataclass(frozen=True)
class Options:
    """Options of a landscape, checked when made.

    Attributes:
        plane: ``random`` directions around the first model, through the first three ``models``, or the first two
            principal components (``pca``) of the trajectory.
        grid: points along either axis, and along a line.
        range: first and last coordinate of both axes; None: -1 and 1 in a random plane, else around the models.
        seed: of directions and samples.
        models: the global model, the number of a client, or the global model of ``reference``. Lines go from each to
            the next, and from the first to the reference.
        round: rounds that were closed; None: all.
        data: ``test``, ``train`` or ``client:<number>``.
        mask: whether ``all`` coordinates move, or those ``inside`` or ``outside`` the run's mask. Lines move all.
        reference: folder of a run of the same model.
        samples: of each split, drawn once; None: all.
        surface: whether the plane is evaluated and drawn.
        refine: whether few points of the plane are evaluated and the others interpolated by a cubic spline.
        tolerance: of the spline, largest error at held-out points as a part of the range of the loss.
        gif: whether the plane of every kept round is drawn, on fixed axes.
        curvature: whether eigenvalues and trace of the Hessian are measured.
        sharpness: whether the rise of the loss nearby is measured, and what follows from it.
        sigma_of: whether the ``accuracy`` falls or the ``loss`` rises by 0.1 under noise of standard deviation sigma.
        processes: that share the points of a plane.

    Raises:
        ValueError: an option that cannot be meant; one line with the key.

    """

    plane: str = "random"
    grid: int = 25
    range: Sequence[float] | None = None
    seed: int = 0
    models: Sequence[str | int] = (GLOBAL, 0, 1)
    round: int | None = None
    data: Sequence[str] = ("test", "client:0")
    mask: str = "all"
    reference: str | None = None
    samples: int | None = None
    surface: bool = True
    refine: bool = False
    tolerance: float = 0.01
    gif: bool = False
    curvature: bool = True
    sharpness: bool = False
    sigma_of: str = "accuracy"
    processes: int = 1

    def __post_init__(self) -> None:
        check_choice("plane", self.plane, "random", "models", "pca")
        check_whole("grid", self.grid, 3)
        check_whole("seed", self.seed, 0)
        check_choice("mask", self.mask, "all", "inside", "outside")
        flags = {"surface": self.surface, "refine": self.refine, "gif": self.gif}
        for key, flag in {**flags, "curvature": self.curvature, "sharpness": self.sharpness}.items():
            check_flag(key, flag)
        check_positive("tolerance", self.tolerance)
        check_choice(SIGMA_OF, self.sigma_of, "accuracy", "loss")
        check_whole("processes", self.processes, 1)
        for key, value, least in (("round", self.round, 0), ("samples", self.samples, 1)):
            if value is not None:
                check_whole(key, value, least)
        _check_range(self.range)
        if not (self.reference is None or isinstance(self.reference, str)):
            raise ValueError(f"reference takes a run folder, not {self.reference!r}")
        _check_listed("models", self.models, _is_model, f"{GLOBAL}, {REFERENCE} and numbers of clients")
        _check_listed("data", self.data, _is_data, f"test, train and {CLIENT}<number>")
        if REFERENCE in self.models and self.reference is None:
            raise ValueError(f"models is {list(self.models)}; its reference needs reference=<run folder>")
        if self.round == 0 and any(isinstance(model, int) for model in self.models):
            raise ValueError("round=0 is the start, before any client has trained; set models=[global]")
        if self.gif and not self.surface:
            raise ValueError("gif=true draws surfaces; it does not go with surface=false")
        if self.plane == "models" and len(self.models) < 3:
            raise ValueError(f"models is {list(self.models)}; plane=models must have three")

    @classmethod
    def read(cls, typed: Sequence[str]) -> Options:
        """Read what was typed.

        Raises:
            ValueError: an unknown or repeated key, no YAML, or a value that cannot be meant.

        """
        keys = {SIGMA_OF if field.name == "sigma_of" else field.name: field.name for field in fields(cls)}
        found = dict[str, Any]()
        for word in typed:
            key, _, value = word.partition("=")
            if key not in keys:
                raise ValueError(f"{word} is no option of a landscape; its keys are {', '.join(keys)}, trust")
            if keys[key] in found:
                raise ValueError(f"{key} is given twice")
            try:
                found[keys[key]] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{word} is no YAML; a list is written as data=[test,client:0]") from error
        return cls(**found)

    def pairs(self) -> list[tuple[str | int, str | int]]:
        """Ends of the lines between models."""
        own = [model for model in self.models if model != REFERENCE]
        far = [] if self.reference is None else [(own[0], REFERENCE)] if own else []
        return [*pairwise(own), *far]


def title(model: str | int) -> str:
    """Name a model for people.

    >>> title("global"), title(3)
    ('global', 'client 3')
    """
    return model if isinstance(model, str) else f"client {model}"


def client_of(data: str) -> int | None:
    """Client whose data is meant, or None.

    >>> client_of("client:3"), client_of("test")
    (3, None)
    """
    return int(data.removeprefix(CLIENT)) if data.startswith(CLIENT) else None


def _check_range(value: Any) -> None:
    """Refuse what are not two rising numbers."""
    two = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(finite, value)) and value[0] < value[1]
    if value is not None and not two:
        raise ValueError(f"range is {value!r}; it must be null or two numbers that rise, such as [-1,1]")


def _check_listed(option: str, value: Any, good: Any, which: str) -> None:
    """Refuse what is no list of such values, each once."""
    listed = isinstance(value, (list, tuple)) and len(value) and all(map(good, value))
    if not listed or len(set(value)) < len(value):
        raise ValueError(f"{option} is {value!r}; it must be a list of {which}, each once")


def _is_model(value: Any) -> bool:
    return value in (GLOBAL, REFERENCE) if isinstance(value, str) else type(value) is int and value >= 0


def _is_data(value: Any) -> bool:
    return isinstance(value, str) and (value in ("test", "train") or value.removeprefix(CLIENT).isdecimal())
