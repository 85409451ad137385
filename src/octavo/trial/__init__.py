"""What training a model costs, measured: time, memory, where the time goes, against the bfloat16 model."""
