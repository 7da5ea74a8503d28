"""What to measure in the first ten minutes on a GPU, in an order in which the most important comes first.

python jobs/first_gpu.py --out outputs/first_gpu --prior-views views.zip
python jobs/first_gpu.py --out outputs/first_gpu --table       what was found, as a table
python jobs/first_gpu.py --small                               the same in little on a CPU
"""

import sys

from raydream.bench.first_gpu import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0]))
