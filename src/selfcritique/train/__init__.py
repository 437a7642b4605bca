"""Training: pure losses, batches, model access, Lightning modules, and the loop that fits them."""
