"""Training of adapters for the sharing that they are served under: ``forkkv train-adapter``."""
