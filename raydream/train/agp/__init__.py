"""Fine-tuning a prior into the aligned geometric prior."""
