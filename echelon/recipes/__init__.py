"""One file per method, read from top to bottom: what it does, its settings, its loop. No recipe imports another."""
