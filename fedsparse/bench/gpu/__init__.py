"""A check on one GPU: exactness, time beside a hand-written loop, memory, waits: ``python -m fedsparse.bench.gpu``.

It needs torch, lightning, timm, transformers, hydra-core and omegaconf; no network, no make, and no wandb.

Sections:
    cli: whole runs of ``fedsparse.train``; which pairs of them end in equal bits.
    vit: rounds of a ViT-S/16 beside the loop's, and where the host waits for the device.
    small: many clients of small networks, alone and stacked.
    bert: BERT-base, all of it sent and the largest tenth with error feedback.
    profile: what the device does in a round, and how long it idles.
    determinism: the same federation twice.
"""
