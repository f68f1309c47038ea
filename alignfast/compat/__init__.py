"""Other packages' names over the same engine."""
