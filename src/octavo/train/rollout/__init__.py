"""Who answers the prompts: the model itself, or a server that gets its adapter."""
