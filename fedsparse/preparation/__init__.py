"""What happens before round 1: the head, and the calibration of a mask rule."""
