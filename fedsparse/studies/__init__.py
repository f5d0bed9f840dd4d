"""Studies of many runs, and how the shipped weights were trained."""
