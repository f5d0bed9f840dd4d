"""The run folder: every file name in it, once. Rooms of all levels write and read it."""

from __future__ import annotations

# what it was asked
CONFIG, HYDRA, OVERRIDES = ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"
LOG, LOCK, RUN_ID = "run.log", ".lock", ".run_id"
# what is found before the first round
PARTITION, MASK, CLIENT_MASKS = "partition.png", "mask.safetensors", "client_masks.safetensors"
MASK_PICTURE, CALIBRATION = "mask.png", "calibration.json"
# round by round
METRICS, TRAFFIC, CLIENTS = "metrics.csv", "traffic.csv", "clients.csv"
CHECKPOINTS, LAST, PREVIOUS, BEST = "checkpoints", "last.ckpt", "last.previous.ckpt", "best.ckpt"
# in the end
WEIGHTS, SUMMARY, CURVES, DEVIATION = "model.safetensors", "summary.json", "curves.png", "guidance.safetensors"
# by other commands
SCALE, EXPORT = "scale.json", "export"
# of a run that got as far as its first round, or of a calibration
TRACES = (SUMMARY, METRICS, CHECKPOINTS, CALIBRATION)


def store(name: str) -> str:
    """Name the file of a store of what clients keep."""
    return f"{name}.bin"
