"""Training of soft prompts: MetaPT, its baselines, and what they need."""

__version__ = "0.1.0"
