"""Engines: one Protocol (`base`), several ways to run a model."""
