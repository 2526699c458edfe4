"""What a trained model looks at, how well it denoises, and where it fails."""
