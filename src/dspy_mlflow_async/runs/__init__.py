"""Runs of evaluations and compiles, each with its own steps, metrics and artifacts."""
