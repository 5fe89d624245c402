"""Records on disk that outlive their process."""
