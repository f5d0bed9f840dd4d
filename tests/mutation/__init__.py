"""Mutation testing: random one-token changes of the core, and whether a test notices each (``make mutate``).

``mutants`` makes the changes, ``record`` says which tests run which line, ``worker`` runs tests in a forked child with
one file changed, ``__main__`` puts them together. ``[tool.mutate]`` of ``pyproject.toml`` names the core.
"""
