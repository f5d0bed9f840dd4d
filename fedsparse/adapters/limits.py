"""Limits of a command on adapters, which its ``--help`` states without torch."""

from __future__ import annotations

MOST = 64  # new tokens of an answer
