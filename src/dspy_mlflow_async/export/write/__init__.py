"""Writes operations to an MLflow store, and says what its errors mean."""
