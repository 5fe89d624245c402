"""Writing of operations to an MLflow store, and the meaning of its errors."""
