"""Time and memory of one layer on this machine, beside what it is compared with; correctness first."""
