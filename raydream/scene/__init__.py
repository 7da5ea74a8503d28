"""Scenes: what a particle optimises and how it becomes an asset."""
