"""Device code of prefix attention: `forward`, and the backward pass in two forms."""
