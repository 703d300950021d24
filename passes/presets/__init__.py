"""Recipes that come with planish: one file each, read by `planish.passes.infrastructure.recipe`."""
