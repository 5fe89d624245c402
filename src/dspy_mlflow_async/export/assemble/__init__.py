"""Which spans make a trace: put together, held back, shown while open, late."""
