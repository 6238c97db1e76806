"""FID and KID."""
