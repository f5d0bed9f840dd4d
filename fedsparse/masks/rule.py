"""What a mask rule is: it observes calibration batches, if it wants any, and scores every coordinate.

Shapes: ``P`` coordinates of the space, ``b`` samples of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace
from fedsparse.masks.gradients import Losses
from fedsparse.masks.mask import Mask
from fedsparse.masks.select import select
from fedsparse.masks.sparsity import Sparsity


class MaskRule:
    """Scores every coordinate; ``sparsity`` says how many of the best train.

    Attributes:
        largest: whether the largest scores train, or the smallest.
        needs_data: whether ``observe`` wants calibration batches.
        explores: whether ``mask`` wants, as ``observed``, the mean over clients of the squared deviation of every
            coordinate, which an explore phase measures.
        listens: whether ``hear`` wants the clients' updates of every training round; ``mask`` then takes a keyword
            ``memory``.
        iterations: how often ``observe`` wants the network alone, without any data or client; ``x`` is then one input,
            of which the shape is meant; None: never.
        renewable: whether ``mask`` can be asked again later, for another sparsity.

    >>> class Heaviest(MaskRule):
    ...     def scores(self, row, observed, generator):
    ...         return row.abs()
    >>> space = ParamSpace(["fc.weight"], [torch.Size([4])])
    >>> mask = Heaviest().mask(space, torch.tensor([1.0, -4.0, 2.0, 3.0]), Sparsity(0.5))
    >>> mask.tensors["fc.weight"]
    tensor([False,  True, False,  True])

    """

    largest: bool = True
    needs_data: bool = False
    explores: bool = False
    listens: bool = False
    iterations: int | None = None
    renewable: bool = True

    def observe(
        self,
        net: nn.Module,
        space: ParamSpace,
        x: Tensor,
        y: Tensor,
        *,
        loss: Losses,
        generator: torch.Generator | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Measure one calibration batch; called only if ``needs_data`` or ``iterations``.

        Args:
            net: the network, holding the row to score.
            space: the coordinates.
            x: inputs (b, ...).
            y: labels (b,).
            loss: ``loss(forward, x, y)`` gives the losses (b,); ``forward(x)`` gives the logits.
            generator: the randomness of this batch, if the rule draws any.
            into: float64 (P,) to add to, in place, so that no second row is in memory; zeros by default.

        Returns:
            ``into``: the batches and clients of a calibration round are summed.

        """
        raise NotImplementedError(f"the rule {type(self).__name__} needs data but has no observe()")

    def view(self, row: Tensor, state: Tensor | None) -> Tensor:
        """Give the weights that the next calibration round scores: (P,), the row itself by default."""
        return row

    def start(self, row: Tensor, state: Tensor | None) -> Tensor:
        """Give what a calibration round adds to, float64 (P,): by default what the earlier rounds have summed.

        The state itself, not a copy: a second row in float64 is twice the model's size.
        """
        return torch.zeros(len(row), dtype=torch.float64, device=row.device) if state is None else state

    def take(
        self, state: Tensor | None, observed: Tensor, *, space: ParamSpace, sparsity: Sparsity, round: int, rounds: int
    ) -> Tensor:
        """Take in what a calibration round observed; by default that holds the earlier rounds already (``start``).

        Args:
            state: what the rule knew before the round; None before the first.
            observed: float64 (P,), ``start`` and what ``observe`` added over the round's clients and batches; handed
                over, so a rule may change it.
            space: the coordinates.
            sparsity: how many will train.
            round: the round that ended, from 0.
            rounds: how many there are.

        Returns:
            The new state, (P,).

        """
        return observed

    def hear(self, change: Tensor, start: Tensor) -> Tensor | None:
        """Say what each client's update tells; the mean over the round's clients goes to ``remember``.

        Args:
            change: what the training of K clients changed in the n coordinates that train (K, n).
            start: the values that they started from (K, n).

        Returns:
            (K, n), or None: the rule does not listen.

        """
        return None

    def unheard(self, heard: Tensor) -> float:
        """Say what stands for a coordinate that did not train, beside what was heard of the others (n,): 0."""
        return 0.0

    def remember(self, memory: Tensor | None, heard: Tensor) -> Tensor:
        """Take in what a training round told: by default the sum over the rounds.

        Args:
            memory: float64 (P,), None before the first round.
            heard: float64 (P,), the weighted mean of ``hear`` over the round's clients; ``unheard`` where
                nothing trained.

        Returns:
            float64 (P,), the new memory.

        """
        return heard if memory is None else memory + heard

    def traffic(self, space: ParamSpace, state: Tensor | None) -> tuple[int, int]:
        """Count the bytes (up, down) of one client's calibration message, beside its header and the head.

        By default float32 scores of all coordinates go up, and nothing comes down.
        """
        return 4 * space.size, 0

    def scores(self, row: Tensor, observed: Tensor | None, generator: torch.Generator) -> Tensor:
        """Score every coordinate.

        Args:
            row: the pre-trained values (P,).
            observed: the state after the last calibration round, by default the sum of ``observe`` over batches,
                clients and rounds (P,); None without data.
            generator: the randomness of the rule.

        Returns:
            (P,), float32 or float64.

        """
        raise NotImplementedError(f"the rule {type(self).__name__} has no scores()")

    def mask(
        self,
        space: ParamSpace,
        row: Tensor,
        sparsity: Sparsity,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mask:
        """Choose the coordinates that train; the arguments are those of ``scores`` and ``select``.

        Without a generator one of seed 0 is made.

        Raises:
            ValueError: scores that allow no choice (``select``), or missing observations.

        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        chosen = select(self.scores(row, observed, generator), space, sparsity, largest=self.largest)
        return Mask.of(space, chosen, rule=type(self).__name__, **sparsity.metadata)
