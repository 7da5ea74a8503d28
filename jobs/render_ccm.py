"""An asset library to Parquet shards of views: colours, depth, normals, canonical coordinate maps, cameras, captions.

python jobs/render_ccm.py --out views --source assets
ray job submit --working-dir . -- python jobs/render_ccm.py --out s3://bucket/views --source /data/objaverse

The same command again renders what is missing, also what could not be had the first time (exit code 1). Without
--source it takes the asset folder of this machine, or objects that the project makes itself.
"""

import sys

from raydream.views.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
