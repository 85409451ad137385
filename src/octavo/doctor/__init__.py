"""What this machine can run, and whether it computes the right thing."""
