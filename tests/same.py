"""Say which of the frozen runs have other bits now: ``PYTHONPATH=$PWD python tests/same.py [part of a name]``."""

from __future__ import annotations

import json
import sys

import torch
from frozen import HERE, names, results

if __name__ == "__main__":
    torch.set_num_threads(1)
    kept = json.loads(HERE.read_text(encoding="utf-8"))["runs"]
    wanted = [name for name in names() if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    other = 0
    for name, found in results(wanted):
        pairs = zip(kept[name]["rows"], found["rows"], strict=False)
        keys = sorted({key for old, new in pairs for key in old.keys() | new.keys() if old.get(key) != new.get(key)})
        if found != kept[name]:
            other += 1
            print(f"{name}: {'row, ' if found['row'] != kept[name]['row'] else ''}{', '.join(keys)}")
    print(f"{len(wanted) - other} of {len(wanted)} runs are as they were")
