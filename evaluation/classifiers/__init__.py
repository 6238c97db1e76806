"""Networks trained with labels: fine-tuned, from scratch, on noisy images."""
