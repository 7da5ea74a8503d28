"""Measures finished runs: does the prompt win, do particles differ, have they one front, are the meshes sound.

python jobs/evaluate.py --run runs/chairs
python jobs/evaluate.py --run runs/vsd-* --label vsd --prior outputs/prior --clip clip-vit-base-patch32
python jobs/evaluate.py --run meshes/ --prompt "a chair"      any folder of GLB, OBJ or PLY files

Writes evaluation.json and evaluation.png into each run; several runs also give a Markdown table by label.
"""

import sys

from raydream.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0]))
