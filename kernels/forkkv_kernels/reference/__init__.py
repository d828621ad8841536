"""Plain PyTorch, one file per op: the formula first, then the few lines that compute it. Runs on any device."""
