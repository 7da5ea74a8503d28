"""raydream as a service: prompts come in over HTTP, generations run on the same pipeline as the main job."""
