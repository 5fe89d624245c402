"""What waits for a store, in memory and on disk, and who brings it there."""
