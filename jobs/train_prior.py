"""Trains the embedded text-to-image prior on rendered views, or on a studio's own: VAE, then text encoder and UNet.

python jobs/train_prior.py --views outputs/views --out outputs/prior --workers 2
python jobs/train_prior.py --views outputs/views --out outputs/prior --evaluate
Without Ray, with a packed copy of the views, in a given time:
python jobs/train_prior.py --views outputs/views --pack views.zip
python jobs/train_prior.py --views views.zip --out outputs/prior --no-ray --device cuda --minutes 15
Run the same command again after any interruption.
"""

import sys

from raydream.train.prior.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0]))
