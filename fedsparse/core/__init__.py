"""What everything rests on: rows, seeds, checks, files, processes."""
