"""Between text and tokens, and between text and values."""
