"""Fine-tunes a text-to-image prior to draw canonical coordinate maps for a given camera (the aligned geometric prior).

python jobs/render_ccm.py --recipe prior --set 'views.images=["alpha","ccm"]' --out outputs/ccm
python jobs/finetune_agp.py --views outputs/ccm --prior outputs/prior/prior --out outputs/agp
Stable Diffusion 2.1 on 8 GPUs with ZeRO-2; what that takes:
ray job submit --working-dir . -- python jobs/finetune_agp.py --views s3://bucket/ccm --prior sd21-base \\
    --out s3://bucket/agp --workers 8 --deepspeed 2 --set model.rank=0 --set stage.lr=1e-5
python jobs/finetune_agp.py --plan --workers 8
Without Ray, on a machine of its own: add --no-ray, alone or under torchrun. Run the same command again after any
interruption, with any number of workers; OUT/agp is the trained model.
"""

import sys

from raydream.train.agp.job import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0]))
