"""OpenNemo: the whole Mistral NeMo system in one small package. Start at docs/architecture.md."""

__version__ = "0.1.0"
