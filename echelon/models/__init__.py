"""Language models and the heads that read them."""
