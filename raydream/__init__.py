"""raydream turns a text prompt into several different 3D assets: particles on Ray under one shared score model."""

__version__ = "0.1.0"
