"""Runs to look at: one page that opens from a disk."""
