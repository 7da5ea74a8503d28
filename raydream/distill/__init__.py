"""The distillation: particles, the shared score model and the loop that joins them."""
