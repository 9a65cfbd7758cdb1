"""What the benches compare with: sampling, replay and updates as public code runs them today, on the same weights."""
