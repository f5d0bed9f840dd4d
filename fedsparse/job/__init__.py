"""A run from its configuration: compose, check, assemble, prepare, execute, resume."""
