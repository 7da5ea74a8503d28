"""Measures a particle's step on each backend, what a run spends outside its work, and how cost grows with n.

python jobs/benchmark.py --out benchmark.json
python jobs/benchmark.py --parts step        needs neither Ray nor a prior; takes the GPU too where there is one
python jobs/benchmark.py --parts launches   what a GPU would be asked to do, counted without one; needs triton
python jobs/benchmark.py --parts run --n 8   on a machine without other work, else its wall times say little
"""

import sys

from raydream.bench.command import main, start_as_an_actor_does

if __name__ == "__main__":
    start_as_an_actor_does()
    sys.exit(main(__doc__.splitlines()[0]))
