"""What `medsynth compare` prints and draws."""
