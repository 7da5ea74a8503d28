"""Where actors run: in this process or on Ray; what a run asks of a cluster, and the wait for it."""
