"""Text-to-image models to distil from: finding, loading and keeping them, and those that ship with the package."""
