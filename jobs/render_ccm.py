"""An asset library to Parquet shards of views: colours, depth, normals, canonical coordinate maps, cameras, captions.

python jobs/render_ccm.py --out views --assets assets
ray job submit --working-dir . -- python jobs/render_ccm.py --out s3://bucket/views --assets /data/objaverse

The same command again renders what is missing, also what could not be had the first time (exit code 1). Without
--assets it takes the folder in $RAYDREAM_ASSETS or, where that is not set, objects that the project makes itself.
"""

import sys

from raydream.views.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
