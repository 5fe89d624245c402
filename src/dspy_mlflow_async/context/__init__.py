"""Current call of each task and thread: one context variable of immutable frames, and its way into other threads."""
