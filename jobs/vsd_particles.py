"""Text to n different 3D assets: n NeRF particles under one shared score model (VSD, ProlificDreamer stage 1).

python jobs/vsd_particles.py --n 8
ray job submit --working-dir . -- python jobs/vsd_particles.py --n 8
"""

import sys

from raydream.launch import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0]))
