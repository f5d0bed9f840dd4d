"""Foundations: rows of parameters, seeds, checks of options, files, processes."""
