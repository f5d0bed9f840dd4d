"""Names of all files in a run folder, which packages of all levels write and read."""

from __future__ import annotations

# configuration and log
CONFIG, HYDRA, OVERRIDES = ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"
LOG, LOCK, RUN_ID = "run.log", ".lock", ".run_id"
# of a deployed run: its configuration for server and nodes, and what the nodes declared
DEPLOYED, NODES = "deployed.yaml", "nodes.json"
# written before the first round
PARTITION, MASK, CLIENT_MASKS = "partition.png", "mask.safetensors", "client_masks.safetensors"
MASK_PICTURE, CALIBRATION = "mask.png", "calibration.json"
# written in each round
METRICS, TRAFFIC, CLIENTS = "metrics.csv", "traffic.csv", "clients.csv"
TRAJECTORY, ADAPTERS, CLUSTERS = "trajectory.safetensors", "lora.csv", "clusters.jsonl"
CHECKPOINTS, LAST, PREVIOUS, BEST = "checkpoints", "last.ckpt", "last.previous.ckpt", "best.ckpt"
# written at the end
CLUSTERS_PICTURE, ADAPTERS_PICTURE = "clusters.png", "adapters.png"
WEIGHTS, SUMMARY, CURVES, DEVIATION = "model.safetensors", "summary.json", "curves.png", "guidance.safetensors"
# written by other commands
SCALE, EXPORT, LANDSCAPE, LANDSCAPE_FIGURES = "scale.json", "export", "landscape", "landscape.json"
PEFT, MERGED, MATRIX, MATRIX_PICTURE = "peft", "merged", "adapters_matrix.json", "adapters_matrix.png"
# files of a run that reached its first round, or of a calibration
TRACES = (SUMMARY, METRICS, CHECKPOINTS, CALIBRATION)


def store(name: str) -> str:
    """File name of a client store."""
    return f"{name}.bin"
