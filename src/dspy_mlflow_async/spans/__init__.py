"""What happened? Describes calls, makes their values storable, and records them as spans."""
