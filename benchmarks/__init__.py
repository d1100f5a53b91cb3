"""How long lifting and partitioning take, beside torch.export and torch's own pipeline front end."""
