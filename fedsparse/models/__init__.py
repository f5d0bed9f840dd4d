"""Builders of models, their weights from files or downloads, and the head in closed form."""
