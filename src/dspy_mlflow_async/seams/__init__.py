"""Private names of DSPy and MLflow that we touch, each with its reason; ``doctor`` checks them one by one."""
