"""What was learned?  Perturbations, which are immutable values without a model inside."""
