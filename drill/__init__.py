"""A drill for the day when a private name of DSPy or MLflow goes: each one is taken away, and a program must run on."""
