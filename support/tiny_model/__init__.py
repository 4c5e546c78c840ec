"""How the tiny default model in data/tiny was made."""
