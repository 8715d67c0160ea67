"""Recipes: models, data, settings and displays chosen for one task."""
