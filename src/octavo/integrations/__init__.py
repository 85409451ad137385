"""Where octavo meets transformers, peft and trl: quantizers, adapters, and the calls a user makes."""
