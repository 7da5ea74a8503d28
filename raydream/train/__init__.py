"""The training of priors: captions, batches, workers, the gate and the card; prior/ and agp/ hold what differs."""
