"""The mathematics of training as pure functions over tensors: no models, no episodes, no files."""
