"""What is taken out of a model: features, and what they depend on."""
