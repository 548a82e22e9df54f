"""Every choice of the suite, and every number that a paper states, as Hydra YAML."""
