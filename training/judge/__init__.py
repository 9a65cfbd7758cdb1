"""Training of judges: supervised (SFT, TRACT, regression), on 0/1 accuracy (RLOO, GRPO), and REAL."""
