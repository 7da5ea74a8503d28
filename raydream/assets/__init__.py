"""3D assets: libraries of them, their files read safely, words about them, and their views from any camera."""
