"""What did it score? Evaluations and compiles, each with its own run, steps, scores and artifacts."""
