"""Writes a landscape.json as ``python -m fedsparse.landscape`` does, as far as the report reads it."""

from __future__ import annotations

import json


def barriers(loss, accuracy, gaps=0):
    """Figures of one line: (above the chord, above the worse end, worst) of each."""
    names = ("above_chord", "above_worse_end", "worst")
    return {
        "loss": [],
        "accuracy": [],
        "gaps": gaps,
        "loss_barrier": dict(zip(names, loss, strict=True)),
        "accuracy_barrier": dict(zip(names, accuracy, strict=True)),
    }


def a_landscape(
    run, closed=3, last=True, *, loss=0.5, accuracy=0.75, scale=1.0, clients=True, sharp=True, options=(), **parts
):
    """Write the landscape of a run after ``closed`` rounds; curvature and sharpness are in proportion to ``scale``."""
    figures = {"loss": loss, "accuracy": accuracy}
    apart = {"global to client 0": 1.0, "global to client 1": 3.0, "client 0 to client 1": 4 * scale}
    lines = {
        "global to client 0": barriers((0.1 * scale, 0.05, 2 * scale), (0.25, 0.125, 0.5)),
        "client 0 to client 1": barriers((0.3 * scale, 0.15, 5 * scale), (0.5, 0.25, 0.25)),
    }
    tree = {
        "round": closed,
        "options": {"mask": "all", "samples": None, "models": ["global", 0, 1]} | dict(options or ()),
        "models": {
            "key": "k",
            "models": {"global": {"train": figures, "test": figures, "from_start": 1.0}},
            "distances": apart if clients else {},
        },
        "curvature": {
            "key": "k",
            "samples": 256,
            "eigenvalues": [8 * scale, 4.0, 2.0, 1.0, 0.5],
            "bounds": [1e-6] * 5,
            "trace": 32 * scale,
            "trace_error": 0.5,
            "frobenius": 10 * scale,
            "frobenius_error": 0.1,
        },
    }
    if clients:
        tree |= {f"lines {data}": {"key": "k", "at": [0.0, 1.0], "lines": lines} for data in ("test", "client:0")}
    if sharp:
        tree["sharpness"] = {
            "key": "k",
            "samples": 256,
            "rho": 0.05,
            "sam": {"rise": 0.4 * scale, "first_order": 0.3 * scale},
            "adaptive_sam": {"rise": 0.2, "first_order": 0.1},
            "mean_rise": {"radius": 0.1, "rise": 0.02 * scale, "standard_error": 0.001},
            "sigma": {"of": "accuracy", "target": 0.1, "value": 0.05 / scale},
            "pac_bayes": {"train_error": 0.25, "samples": 1000, "bound": 0.9},
            "path_norm": {"value": 30.0 * scale, "why": None},
        }
    folder = run / "landscape" if last else run / "landscape" / f"round_{closed}"
    folder.mkdir(parents=True, exist_ok=True)
    tree |= parts
    (folder / "landscape.json").write_text(json.dumps({key: part for key, part in tree.items() if part != "gone"}))
    return folder
