"""Everything that takes longer than one request."""
