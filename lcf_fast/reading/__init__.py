"""How models read, for training, channels and evaluation alike: chats, alignment, padding, prefills."""
