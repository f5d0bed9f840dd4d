"""Builders of models, their weights from files or downloads, and the head in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = ["closed_form"]

if TYPE_CHECKING:
    from fedsparse.models.head import closed_form
else:  # a builder needs no solver
    __getattr__, __dir__ = lazily(__name__, {"closed_form": "fedsparse.models.head"})
