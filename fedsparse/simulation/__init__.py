"""A federation under one Lightning Trainer: an epoch is a round, a batch is a bundle of cohorts."""

from fedsparse.simulation.artifacts import wandb_logger
from fedsparse.simulation.callback import FederatedRounds
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.personal import Personal

__all__ = ["ClientModule", "FederatedRounds", "Personal", "wandb_logger"]
