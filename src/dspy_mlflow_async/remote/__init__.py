"""Calls and examples in other processes: what travels, who works there, and what comes home."""
