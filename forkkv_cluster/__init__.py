"""ForkKV Cluster: serving many LoRA agents over one shared context on Ray Serve."""

__version__ = "0.1.0"
