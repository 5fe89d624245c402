"""Stores written as rows, compared with stores written by MLflow, table by table."""
