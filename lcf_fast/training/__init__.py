"""Training an adapter between two frozen models: data, batches, the trainer and its checkpoints."""
