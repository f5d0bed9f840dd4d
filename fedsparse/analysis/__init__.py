"""Tables and pictures from what runs left behind; trains nothing."""
