"""How good finished particles are: does the prompt win, do they differ, do all sides agree, are the meshes sound."""
