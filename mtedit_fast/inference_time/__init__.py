"""What can be won without touching the weights: Flow Priors, attention-map alignment, latent beam search."""
