"""Spans of DSPy's calls: describes each call, makes its values storable, and records it."""
