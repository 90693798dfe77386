"""Data: what is read from files, packed into rows, and replayed."""
