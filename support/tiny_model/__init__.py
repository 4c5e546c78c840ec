"""How data/tiny, the default model, was pretrained."""
