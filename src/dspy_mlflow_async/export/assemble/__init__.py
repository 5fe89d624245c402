"""Assembly of whole traces from spans, with sampling, open traces and late spans."""
