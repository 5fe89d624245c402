"""Runs DSPy's and MLflow's own tests with our autolog on and off, and prints what differs."""
