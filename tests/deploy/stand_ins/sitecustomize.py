"""Puts the stand-ins in every process of Flower that a test starts."""

from __future__ import annotations

import seam

seam.install()
