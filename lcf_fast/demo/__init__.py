"""`lcf-fast demo`: two small agents, trained on the spot, and what each channel between them carries."""
