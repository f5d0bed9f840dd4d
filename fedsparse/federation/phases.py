"""The phases of a run (``conf/phases``): head and calibration come before round 1; the others consist of rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsparse.core.checks import check_choice, check_flag, check_number
from fedsparse.data.rounds import WEIGHTS

KINDS = ("head", "calibrate", "explore", "learn")


@dataclass(frozen=True)
class Phase:
    """One phase.

    Args:
        name: in the progress bar, the logs and the summary.
        rounds: how many; of ``head`` federated steps.
        kind: ``head``, ``calibrate``, ``explore`` (every chosen client starts from the same row; the mask rule scores
            how far it moved) or ``learn``; null: the name, or learn.
        updates_model: whether the clients' changes go into the global model; in ``explore`` each client then starts
            where the previous one stopped.
        informs_mask: whether the phase is evidence for the mask rule; if not, the mask stays.
        local_steps: of each client and round; null, with ``local_epochs`` null too: as in ``federation``.
        local_epochs: of each client and round, in place of local steps.
        patience: epochs without a better loss after which a client stops; null: none stops early.
        clients: of a round, a fraction or a count; null: ``federation.clients_per_round``.
        weight: of a client in the mean that the mask rule scores: ``held``, ``processed`` or ``equal``.
        lr: the clients' learning rate, constant; null: ``optimizer.lr`` with its schedule.

    Raises:
        ValueError: an option out of range, or options that exclude each other; one line names them.

    """

    name: str
    rounds: int = 1
    kind: str | None = None
    updates_model: bool = True
    informs_mask: bool = True
    local_steps: int | None = None
    local_epochs: int | None = None
    patience: int | None = None
    clients: float | int | None = None
    weight: str | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        """Set the kind, and check the options."""
        check_choice(f"phases.{self.name}.kind", self.kind, None, *KINDS)
        if self.kind is None:
            object.__setattr__(self, "kind", self.name if self.name in KINDS else "learn")
        least = 0 if self.kind == "head" else 1
        check_number(f"phases.{self.name}.rounds", self.rounds, whole=True, least=least)
        check_flag(f"phases.{self.name}.updates_model", self.updates_model)
        check_flag(f"phases.{self.name}.informs_mask", self.informs_mask)
        for key in ("local_steps", "local_epochs", "patience"):
            typed = self._key(key.removeprefix("local_"))
            check_number(typed, getattr(self, key), whole=True, least=1, null=True)
        self._check_together()

    def _check_together(self) -> None:
        check_choice(self._key("weight"), self.weight, None, *WEIGHTS)
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(f"give either {self._key('steps')} or {self._key('epochs')}, and set the other to null")
        if self.patience is not None and self.local_epochs is None:
            raise ValueError(f"{self._key('patience')} counts epochs: set {self._key('epochs')}, and steps to null")
        if self.kind == "explore" and not self.updates_model and not self.informs_mask:
            raise ValueError("an exploration that neither informs the mask nor updates the model does nothing")
        if self.kind == "learn" and not self.updates_model:
            raise ValueError(f"phases.{self.name}.updates_model is false: clients that do not learn explore (kind)")
        check_number(self._key("lr"), self.lr, above=0, null=True)

    def _key(self, what: str) -> str:
        """Config key of an option."""
        local = "local_" if what in ("steps", "epochs") else ""
        return f"explore.{what}" if self.kind == "explore" else f"phases.{self.name}.{local}{what}"

    @property
    def clients_key(self) -> str:
        """Config key of the number of clients."""
        return "federation.clients_per_round" if self.clients is None else self._key("clients")

    @property
    def lr_key(self) -> str:
        """Config key of the clients' learning rate."""
        return "optimizer.lr" if self.lr is None else self._key("lr")

    @property
    def explores(self) -> bool:
        """Whether clients explore instead of learn."""
        return self.kind == "explore"


class Phases:
    """The phases of a run, in order.

    Args:
        listed: the phases of preparation and of rounds.

    Attributes:
        prepare: phases before round 1.
        rounds: phases that consist of rounds.

    Raises:
        ValueError: the order is not head, calibrate, explore, learn; or nothing is learned.

    """

    def __init__(self, listed: Sequence[Phase]) -> None:
        order = [KINDS.index(phase.kind or "") for phase in listed]
        if order != sorted(order) or any(order.count(kind) > 1 for kind in range(KINDS.index("learn"))):
            names = ", ".join(phase.name for phase in listed)
            raise ValueError(
                f"phases are {names}; they must come as head, calibrate, explore, learn, each at most once"
            )
        self.prepare = [phase for phase in listed if phase.kind in ("head", "calibrate")]
        self.rounds = [phase for phase in listed if phase not in self.prepare]
        if not any(phase.kind == "learn" for phase in listed):
            raise ValueError("phases need one in which clients learn: add phases.learn.rounds")

    @classmethod
    def of(cls, config: Mapping[str, Mapping[str, Any] | None]) -> Phases:
        """Build the phases of ``conf/phases``: options by name of the phase; null leaves one out."""
        return cls([_phase(name, options) for name, options in config.items() if options is not None])

    @property
    def total(self) -> int:
        """Rounds in which clients train."""
        return sum(phase.rounds for phase in self.rounds)

    @property
    def explore(self) -> Phase | None:
        """The exploration, if there is one."""
        return next((phase for phase in self.rounds if phase.explores), None)

    @property
    def explored(self) -> int:
        """Number of rounds of exploration, which come first."""
        return 0 if self.explore is None else self.explore.rounds

    def prepares(self, kind: str) -> int:
        """Number of rounds of a phase of the preparation, ``head`` or ``calibrate``; 0 without it."""
        return next((phase.rounds for phase in self.prepare if phase.kind == kind), 0)

    def has(self, kind: str) -> bool:
        """Whether there is a phase of a kind."""
        return any(phase.kind == kind for phase in [*self.prepare, *self.rounds])

    def at(self, round: int) -> tuple[Phase, int]:
        """Find a round's phase, and its number there, from 0; the last phase has no end."""
        for phase in self.rounds[:-1]:
            if round < phase.rounds:
                return phase, round
            round -= phase.rounds
        return self.rounds[-1], round

    def explores(self, round: int) -> bool:
        """Whether clients explore in a round."""
        return self.at(round)[0].explores

    def closed(self, rounds: int) -> list[list[Any]]:
        """List name and count of the phases of the first rounds: plain values for a checkpoint."""
        names = [self.at(round)[0].name for round in range(rounds)]
        return [[name, names.count(name)] for name in dict.fromkeys(names)]

    def check(self, closed: Sequence[Sequence[Any]]) -> None:
        """Refuse a checkpoint whose rounds belong to other phases.

        Raises:
            ValueError: names the closed rounds.

        """
        rounds = sum(count for _, count in closed)
        if self.closed(rounds) != [list(phase) for phase in closed]:
            said = ", ".join(f"{name} {count}" for name, count in closed)
            raise ValueError(
                f"the rounds that are closed are {said}: with as many rounds as were asked for they would be others; "
                "only the last phase can be given more"
            )

    def of_kind(self, round: int) -> int:
        """Count the earlier rounds of the same kind: exploration, or learning."""
        phase, number = self.at(round)
        return number + self.before(phase)

    def before(self, phase: Phase) -> int:
        """Count the rounds of earlier phases of the same kind: exploration, or learning."""
        earlier = self.rounds[: self.rounds.index(phase)]
        return sum(other.rounds for other in earlier if other.explores == phase.explores)


def _phase(name: str, options: Any) -> Phase:
    """Build a phase of its options."""
    known = [option for option in Phase.__dataclass_fields__ if option != "name"]
    if not isinstance(options, Mapping) or not set(options) <= set(known):
        raise ValueError(f"phases.{name} is {options!r}; it must be null or a node of {', '.join(known)}")
    return Phase(name, **options)
