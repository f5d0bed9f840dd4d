"""What happens before round 1: the head, and the calibration that a mask rule is told of."""
