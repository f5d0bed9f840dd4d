"""From a configuration to a run: composed, checked, assembled, prepared, carried out, and gone on with."""
