"""Files on disk -> uint8 arrays."""
