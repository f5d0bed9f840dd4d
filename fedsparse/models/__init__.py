"""Builders of models: vision transformers and small reference nets."""
