"""Training: models and adapters that this repository makes itself."""
