"""Who am I inside? One context variable of immutable frames, and the way it travels between threads."""
