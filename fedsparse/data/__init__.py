"""Data of a federation: data sets, partitions, rounds."""
