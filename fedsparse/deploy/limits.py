"""What is not deployed, and what does it instead: refused before anything is sent."""

from __future__ import annotations

from fedsparse.job.parts import Assembly

CALIBRATE = "python -m fedsparse.calibrate with the same arguments on data that represent the clients', then"
FROM_FILE = f"{CALIBRATE} mask_rule=from_file mask_rule.path=<folder>/mask.safetensors"


def check_deployed(assembly: Assembly) -> None:
    """Refuse what a deployed run cannot do.

    Raises:
        ValueError: one line that names the key, and what does it.

    """
    method, phases = assembly.method, assembly.course.phases
    refused = {
        "mask.owner=client": (method.own_masks, "each client's mask stays with it: set mask.owner=global"),
        "lora.ranks": (bool(method.ranks), "clients of several ranks are simulated only: set lora.ranks=null"),
        "a mask that changes": (method.changes, "set sparsity.schedule and sparsity.renew_every to null"),
        "an exploration": (phases.explore is not None, f"run {FROM_FILE}"),
        "merging into frozen weights": (method.merging is not None, "method=fedit or method=fedsa keeps these"),
        "topology.clusters_within": (method.regrouping is not None, "set topology.clusters_within=1"),
        "evaluation=per_client": (assembly.session.personal is not None, "set evaluation=global"),
        "federation.buffers=local": (assembly.config["federation"]["buffers"] == "local", "set it to average"),
    }
    for what, (found, remedy) in refused.items():
        if found:
            raise ValueError(f"{what} is not deployed: {remedy}")
