"""Queues of operations for a store, in memory and on disk, with the threads and processes that empty them."""
