"""Hydra configuration: `config.yaml` and its groups, shipped with the package."""
