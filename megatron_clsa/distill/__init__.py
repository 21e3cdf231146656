"""The distillation loss that teaches the indexer, and what is measured of it."""
