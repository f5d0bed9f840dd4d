"""Sixty runs whose bits are kept: ``python tests/frozen.py`` writes them anew, ``test_frozen.py`` compares.

They cross exchanges, averages, phases, mask rules, cohort sizes, resumes and processes. A change of structure leaves
every one of them as it is; a change of numbers is a commit of its own, which writes the file anew and says why.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).with_suffix(".json")
BASE = (
    "model=mlp",
    "logger=csv",
    "pictures=false",
    "federation.rounds=3",
    "federation.num_clients=8",
    "calibration.head_steps=4",
)
DENSE = ("mask_rule=dense",)
MEAN = ("aggregation=coordinate_mean",)
CARRIED = (*MEAN, "aggregation.denominator=participants", "exchange.feedback=0.9")
TOPK = (*DENSE, "exchange=topk", "exchange.fraction=0.1")
EVERYONE = ("sampling=everyone",)
NC2 = ("partition=noniid_nc2", "partition.even=false")
UNEVEN = ("partition=dirichlet", "federation.local_epochs=1", "federation.local_steps=null")
AUTOFLIP = ("mask_rule=autoflip", "phases=explore", "explore.steps=5")
GRADUAL = ("mask_rule=most_sensitive", "sparsity=gradual80")
BATCHNORM = (
    "model=fednet",
    "mask_rule=random",
    "federation.num_clients=4",
    "federation.local_steps=2",
    "federation.rounds=2",
)

RUNS: dict[str, tuple[str, ...]] = {
    "default": (),
    "one at a time": ("federation.cohort=1",),
    "three at a time": ("federation.cohort=3",),
    **{f"mask rule {rule}": (f"mask_rule={rule}",) for rule in (
        "dense", "random", "least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "talos",
        "snip", "synflow",
    )},
    "own masks": ("mask.owner=client", "mask_rule=most_sensitive", "federation.cohort=1"),
    "own masks, three at a time": ("mask.owner=client", "mask_rule=random", "federation.cohort=3"),
    "pruned": ("mask_rule=highest_magnitude", "sparsity.mode=prune"),
    "units": ("mask_rule=most_sensitive", "sparsity.unit=output", "federation.cohort=1"),
    "full": ("exchange=full", "mask_rule=random"),
    **{f"topk {by}": (*TOPK, *MEAN, f"exchange.by={by}") for by in (
        "largest_change", "largest_final", "smallest_change",
    )},
    "topk, one at a time": (*TOPK, *MEAN, "federation.cohort=1"),
    "topk of values": (*TOPK, *MEAN, "exchange.payload=value"),
    "topk as the original": (*TOPK, *MEAN, "exchange.payload=value", "exchange.compat=original"),
    "topk, carried over": (*TOPK, *CARRIED),
    "topk, carried over, half": (*TOPK, *CARRIED, "exchange.precision=float16", "federation.cohort=1"),
    "randomk": (*DENSE, *MEAN, "exchange=randomk", "exchange.fraction=0.2"),
    "randomk, 8 bits": (*DENSE, *MEAN, "exchange=randomk", "exchange.fraction=0.2", "exchange.precision=int8"),
    "threshold": (*DENSE, *MEAN, "exchange=threshold", "exchange.threshold=0.01"),
    "layers": (*DENSE, *MEAN, "exchange=layers"),
    "pattern": (*DENSE, *MEAN, "exchange=pattern", "exchange.names=[head.*]"),
    "half a mask": ("mask_rule=random", "exchange.precision=bfloat16"),
    **{f"average {name}": (*DENSE, *EVERYONE, *UNEVEN, f"aggregation={name}") for name in (
        "coordinate_mean", "fednova", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median",
    )},
    "attacked median": (*DENSE, *EVERYONE, "aggregation=median", "exchange.attackers=2"),
    **{f"server {name}": ("mask_rule=random", f"server={name}") for name in (
        "fedadam", "fedyogi", "fedadagrad", "fedavgm", "fedavgm_ema",
    )},
    "server fedadam, topk": (*TOPK, *MEAN, "server=fedadam", "server.untouched=freeze"),
    "fedprox": ("mask_rule=random", "objective=fedprox"),
    "scaffold": ("mask_rule=random", "objective=scaffold", "federation.cohort=1"),
    "scaffold, three at a time": (*DENSE, "objective=scaffold", "federation.cohort=3"),
    "adam": ("mask_rule=random", "optimizer=adam"),
    "adamw": ("mask_rule=random", "optimizer=adamw", "schedule=cosine"),
    "explored": AUTOFLIP,
    "explored, with a head start": (*AUTOFLIP, "explore.keep_model=true", "federation.cohort=1"),
    "explored and pruned": (*AUTOFLIP, "sparsity.mode=prune"),
    "gradual": (*GRADUAL, "federation.rounds=6"),
    "gradual, carried over": (*GRADUAL, "federation.rounds=6", "exchange=topk", "exchange.fraction=0.3", *CARRIED),
    "gradual, scaffold": (*GRADUAL, "federation.rounds=6", "objective=scaffold", "federation.cohort=1"),
    "gradual, fedadam": (*GRADUAL, "federation.rounds=6", "server=fedadam"),
    "movement": ("mask_rule=movement", "sparsity=gradual80", "federation.rounds=6"),
    "renewed": ("mask_rule=random", "sparsity.renew_every=1"),
    "fine-tuned": ("mask_rule=random", "phases=fine_tune"),
    "personal head": ("mask_rule=random", "evaluation=per_client", *NC2),
    "two classes": ("mask_rule=random", *NC2, "federation.weight=processed"),
    "dirichlet": ("mask_rule=random", "partition=dirichlet01", "federation.weight=equal", *UNEVEN[1:]),
    "jittered": ("mask_rule=random", "data.augment=crop_flip"),
    "two processes": (*TOPK, *CARRIED, "trainer.devices=2", "federation.cohort=1"),
    "two processes, scaffold": ("mask_rule=random", "objective=scaffold", "trainer.devices=2", "federation.cohort=2"),
    **{f"BatchNorm, {kept}": (*BATCHNORM, f"federation.buffers={kept}") for kept in ("average", "local", "frozen")},
    "convolutions": ("model=conv", "mask_rule=random", "federation.local_steps=2", "federation.rounds=2"),
    "transformer": ("model=vit_digits", "mask_rule=random", "federation.rounds=1", "federation.local_steps=2"),
}  # fmt: skip
RESUMED = ("default", "topk, carried over", "gradual, carried over", "scaffold", "server fedadam, topk", "explored")
UNCOUNTED = ("seconds",)


def canary() -> str:
    """Hash what this machine's arithmetic gives: where it differs, so do the bits of runs, and only figures compare."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 130, generator=generator) for _ in range(2))
    parts = (a @ b.T, torch.softmax(a, 1), a.exp().sum(1), torch.nn.functional.gelu(b).sum(0), torch.linalg.qr(a)[1])
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv, without what no two runs share, and without columns that came after the freeze."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    later = ("personal/", "val/personal_")
    kept = [{key: value for key, value in row.items() if value and not key.startswith(later)} for row in rows]
    return [{key: float(value) for key, value in row.items() if key not in UNCOUNTED} for row in kept]


def result(name: str, folder: Path) -> dict[str, object]:
    """Carry out a run; its global row's hash, and its rows."""
    from fedsparse import run

    typed = [*BASE, *RUNS[name.removeprefix("resumed: ")], f"hydra.run.dir={folder}"]
    if name.startswith("resumed: "):
        rounds = [o for o in typed if o.startswith("federation.rounds=")][-1]
        run([*typed, "federation.rounds=2"])
        summary = run([f"resume={folder}", rounds])
    else:
        summary = run(typed)
    return {"row": summary["global_sha256"], "bytes_total": summary["bytes_total"], "rows": rows_of(folder)}


def names() -> list[str]:
    """All runs."""
    return [*RUNS, *(f"resumed: {name}" for name in RESUMED)]


def results(wanted: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Carry runs out in a folder that does not last."""
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield name, result(name, Path(folder) / "run")


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"canary": canary(), "torch": torch.__version__}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(kept)}" for name, kept in results(names()))
    HERE.write_text(f'{json.dumps(found)[:-1]}, "runs": {{\n{lines}\n}}}}\n', encoding="utf-8")
