"""Preparation before round 1: initialisation of the head, and calibration of a mask rule."""
