"""What a model is worth on records, and what training made it forget."""
