"""Spool: records on disk that outlive their process."""
